"""Cross-scale connections (CSC): how the levels hear from one another inside G. A new one is a file and a line here.

Shapes: B batch, C channels, L levels; level j is (B, C, H_j, W_j), coarser levels have the larger index.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from adapters.detection.necks.cross_scale.bifpn import BiFPNConnection
from adapters.detection.necks.cross_scale.dense import DenseConnection
from adapters.detection.necks.cross_scale.identity import NoConnection
from adapters.detection.necks.cross_scale.nas_fpn import NASFPNConnection
from adapters.detection.necks.cross_scale.pyramid import PyramidConv

__all__ = [
    "CROSS_SCALE_CONNECTIONS",
    "BiFPNConnection",
    "CrossScaleFactory",
    "DenseConnection",
    "NASFPNConnection",
    "NoConnection",
    "PyramidConv",
]


class CrossScaleFactory(Protocol):
    """What builds a cross-scale connection.

    The connection is a module that maps L maps to L maps of the same shapes. It is called as `module(levels)`, and
    where the neck masks padding as `module(levels, masks)` with a mask (B, 1, H_j, W_j) per level. It may have a method
    `zero_init_` that sets its parameters such that it gives zero.
    """

    def __call__(self, channels: int, num_levels: int, *, share: bool | None) -> nn.Module:
        """Build the connection of `num_levels` levels, with weights shared over levels, or not, or as it sees fit."""
        ...


CROSS_SCALE_CONNECTIONS: Mapping[str, CrossScaleFactory] = {
    "none": NoConnection,
    "dense": DenseConnection,
    "pyramid": PyramidConv,
    "bifpn": BiFPNConnection,
    "nas_fpn": NASFPNConnection,
}
"""The cross-scale connections that can be asked for by name."""
