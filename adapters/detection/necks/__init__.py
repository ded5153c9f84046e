"""Necks: feature pyramid networks that torchvision's detectors take in place of their own."""

from adapters.detection.necks.blocks import ResidualBlock
from adapters.detection.necks.convert import convert_fpn_
from adapters.detection.necks.cross_scale import (
    CROSS_SCALE_CONNECTIONS,
    BiFPNConnection,
    CrossScaleFactory,
    DenseConnection,
    NASFPNConnection,
    NoConnection,
    PyramidConv,
)
from adapters.detection.necks.implicit_fpn import ImplicitFPN, last_solution
from adapters.detection.necks.iteration import PRESETS
from adapters.detection.necks.mdeq import MDEQTransform
from adapters.detection.necks.norms import OUT_NORMS
from adapters.detection.necks.transform import TRANSFORMS, NonlinearTransform

__all__ = [
    "CROSS_SCALE_CONNECTIONS",
    "OUT_NORMS",
    "PRESETS",
    "TRANSFORMS",
    "BiFPNConnection",
    "CrossScaleFactory",
    "DenseConnection",
    "ImplicitFPN",
    "MDEQTransform",
    "NASFPNConnection",
    "NoConnection",
    "NonlinearTransform",
    "PyramidConv",
    "ResidualBlock",
    "convert_fpn_",
    "last_solution",
]
