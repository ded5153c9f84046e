"""Dense connection, (a) of i-FPN (arXiv 2012.13563, Fig. 4a), after the fusion of HRNet (arXiv 1908.07919).

Every level hears from all:

    O_i = sum over j of W_ij(R_j)

`W_ij` is a 1x1 convolution for j = i; for a coarser level, j > i, a 1x1 convolution and nearest upsampling; for a finer
one i - j convolutions 3x3 with stride 2. Between those there is a ReLU, as in HRNet (the paper does not say); without
it they would be one linear map. There is no norm, where HRNet has one after every convolution.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.detection.necks.blocks import conv, resize, zero_convs_
from adapters.detection.necks.norms import Masks, blank

__all__ = ["DenseConnection"]


class DenseConnection(nn.Module):
    """Dense connection.

    Args:
        channels: Width C of every level.
        num_levels: Number of levels L.
        share: False (as None): every pair of levels has its own weights. True: pairs of the same distance i - j share
            them.

    Raises:
        ValueError: If `num_levels` is less than 1.
    """

    def __init__(self, channels: int, num_levels: int, *, share: bool | None = None):
        super().__init__()
        if num_levels < 1:
            raise ValueError(f"num_levels must be at least 1, got {num_levels}")
        self.num_levels, self.share = num_levels, bool(share)
        pairs = ((i, j) for i in range(num_levels) for j in range(num_levels))
        distances = {self._name(i, j): i - j for i, j in pairs}
        # One entry per pair or distance: the convolutions on the way from a level to another.
        self.convs = nn.ModuleDict({name: self._way(channels, d) for name, d in distances.items()})

    def _name(self, i: int, j: int) -> str:
        return str(i - j) if self.share else f"{i}_{j}"

    @staticmethod
    def _way(channels: int, distance: int) -> nn.ModuleList:
        if distance <= 0:
            return nn.ModuleList([conv(channels, 1)])
        return nn.ModuleList(conv(channels, 3, stride=2) for _ in range(distance))

    def forward(self, levels: Sequence[Tensor], masks: Masks | None = None) -> list[Tensor]:
        """Mix the levels.

        Args:
            levels: L maps of shapes (B, C, H_j, W_j), finest first. The sizes are free.
            masks: Where the images are, one (B, 1, H_j, W_j) per level; None if nothing is padded.

        Returns:
            L maps of the same shapes.
        """
        sizes = [x.shape[-2:] for x in levels]
        out = []
        for i in range(self.num_levels):
            terms = [self._term(i, j, levels[j], sizes, masks) for j in range(self.num_levels)]
            out.append(sum(terms[1:], start=terms[0]))
        return out

    def _term(self, i: int, j: int, x: Tensor, sizes: Sequence[torch.Size], masks: Masks | None) -> Tensor:
        way = cast(nn.ModuleList, self.convs[self._name(i, j)])
        if j >= i:
            return resize(way[0](x), sizes[i], "nearest")
        for level, module in enumerate(way, start=j + 1):
            x = resize(module(x), sizes[level])
            if level < i:
                x = blank(F.relu(x), None if masks is None else masks[level])
        return x

    @torch.no_grad()
    def zero_init_(self) -> None:
        """Let the output be zero."""
        zero_convs_(cast(nn.ModuleList, way)[-1] for way in self.convs.values())
