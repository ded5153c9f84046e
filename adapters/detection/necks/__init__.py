"""Necks: feature pyramid networks that torchvision's detectors take in place of their own."""

from adapters.detection.necks.blocks import (
    CROSS_SCALE_CONNECTIONS,
    CrossScaleFactory,
    NonlinearTransform,
    PyramidConv,
    ResidualBlock,
)
from adapters.detection.necks.implicit_fpn import ImplicitFPN, convert_fpn_

__all__ = [
    "CROSS_SCALE_CONNECTIONS",
    "CrossScaleFactory",
    "ImplicitFPN",
    "NonlinearTransform",
    "PyramidConv",
    "ResidualBlock",
    "convert_fpn_",
]
