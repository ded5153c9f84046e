"""Object detection with the implicit feature pyramid network (i-FPN) on torchvision's detectors."""

from adapters.detection.builders import (
    retinanet_resnet18_fpn,
    retinanet_resnet18_ifpn,
    retinanet_resnet50_fpn,
    retinanet_resnet50_ifpn,
)
from adapters.detection.necks import (
    CROSS_SCALE_CONNECTIONS,
    CrossScaleFactory,
    ImplicitFPN,
    NonlinearTransform,
    PyramidConv,
    ResidualBlock,
    convert_fpn_,
)

__all__ = [
    "CROSS_SCALE_CONNECTIONS",
    "CrossScaleFactory",
    "ImplicitFPN",
    "NonlinearTransform",
    "PyramidConv",
    "ResidualBlock",
    "convert_fpn_",
    "retinanet_resnet18_fpn",
    "retinanet_resnet18_ifpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_ifpn",
]
