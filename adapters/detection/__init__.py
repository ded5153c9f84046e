"""Object detection with the implicit feature pyramid network (i-FPN) on torchvision's detectors."""

from adapters.detection.atss import ATSS
from adapters.detection.autoassign import AutoAssign
from adapters.detection.backbones import resnext152_32x8d
from adapters.detection.builders import (
    atss_resnet50_fpn,
    atss_resnet50_ifpn,
    autoassign_resnet50_fpn,
    autoassign_resnet50_ifpn,
    build_detector,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_ifpn,
    fcos_paper_resnet50_fpn,
    fcos_paper_resnet50_ifpn,
    fcos_resnet50_fpn,
    fcos_resnet50_ifpn,
    keypointrcnn_resnet50_fpn,
    keypointrcnn_resnet50_ifpn,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_ifpn,
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
    "atss_resnet50_fpn",
    "atss_resnet50_ifpn",
    "autoassign_resnet50_fpn",
    "autoassign_resnet50_ifpn",
    "build_detector",
    "convert_fpn_",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_ifpn",
    "fcos_paper_resnet50_fpn",
    "fcos_paper_resnet50_ifpn",
    "fcos_resnet50_fpn",
    "fcos_resnet50_ifpn",
    "keypointrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_ifpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_ifpn",
    "resnext152_32x8d",
    "retinanet_resnet18_fpn",
    "retinanet_resnet18_ifpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_ifpn",
]
