"""Object detection with the implicit feature pyramid network (i-FPN) on torchvision's detectors."""

from adapters.detection.atss import ATSS
from adapters.detection.autoassign import AutoAssign
from adapters.detection.builders import (
    retinanet_resnet18_fpn,
    retinanet_resnet18_ifpn,
    retinanet_resnet50_fpn,
    retinanet_resnet50_ifpn,
)
from adapters.detection.deformable import ModulatedDeformConv2d
from adapters.detection.fcos import PaperFCOS
from adapters.detection.necks import (
    CROSS_SCALE_CONNECTIONS,
    CrossScaleFactory,
    ImplicitFPN,
    NonlinearTransform,
    PyramidConv,
    ResidualBlock,
    convert_fpn_,
)
from adapters.detection.points import PointGenerator

__all__ = [
    "ATSS",
    "CROSS_SCALE_CONNECTIONS",
    "AutoAssign",
    "CrossScaleFactory",
    "ImplicitFPN",
    "ModulatedDeformConv2d",
    "NonlinearTransform",
    "PaperFCOS",
    "PointGenerator",
    "PyramidConv",
    "ResidualBlock",
    "convert_fpn_",
    "retinanet_resnet18_fpn",
    "retinanet_resnet18_ifpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_ifpn",
]
