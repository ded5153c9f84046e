"""One NAS-FPN layer as cross-scale connection (arXiv 1904.07392, the 7-merging-cell architecture; Table 4 of i-FPN).

With P3..P7 the five levels:

    p4a = GP(P6, P4)          p5 = SUM(P5, gp(p4, p3))
    p4b = SUM(p4a, P4)        p7 = SUM(P7, gp(p5, p4b))
    p3  = SUM(p4b, P3)        p6 = GP(p7, p5)
    p4  = SUM(p3, p4b)

    SUM(x, y) = cell(x + y),   GP(x, y) = cell(gp(x, y)),   gp(x, y) = y + sigmoid(mean of y over pixels) * x
    cell(x) = GN(conv3x3(ReLU(x)))

where x and y are first brought to the size of the result: nearest interpolation for a coarser map, adaptive max pooling
for a finer one (the max pooling of the original wherever sizes are exact multiples). Deviation: GN in place of BN.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.detection.necks.blocks import max_pool, pick, resize
from adapters.detection.necks.norms import GroupNorm, Masks, blank, each

__all__ = ["NASFPNConnection"]

_NUM_LEVELS = 5
_CELLS = ("p4a", "p4b", "p3", "p4", "p5", "p7", "p6")
_LEVEL = {"p3": 0, "p4": 1, "p4a": 1, "p4b": 1, "p5": 2, "p6": 3, "p7": 4}


class NASFPNConnection(nn.Module):
    """NAS-FPN connection.

    Args:
        channels: Width C of every level.
        num_levels: Number of levels, 5: the architecture was searched for P3..P7.
        share: False (as None): each of the seven cells has its own convolution. True: one for all; the norms stay with
            their cells.

    Raises:
        ValueError: If there are not 5 levels.
    """

    def __init__(self, channels: int, num_levels: int, *, share: bool | None = None):
        super().__init__()
        if num_levels != _NUM_LEVELS:
            raise ValueError(f"cross_scale='nas_fpn' is an architecture for 5 levels, P3..P7; got {num_levels}")
        count = 1 if share else len(_CELLS)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(count))
        self.norms = nn.ModuleDict({name: GroupNorm(channels) for name in _CELLS})

    def forward(self, levels: Sequence[Tensor], masks: Masks | None = None) -> list[Tensor]:
        """Mix the levels.

        Args:
            levels: P3..P7, maps of shapes (B, C, H_j, W_j). The sizes are free.
            masks: Where the images are, one (B, 1, H_j, W_j) per level; None if nothing is padded.

        Returns:
            Maps of the same shapes.
        """
        known = each(masks, _NUM_LEVELS)

        masks_by_size = {x.shape[-2:]: mask for x, mask in zip(levels, known, strict=True)}

        def at(name: str, x: Tensor) -> Tensor:
            return _to_size(x, levels[_LEVEL[name]].shape[-2:], masks_by_size[x.shape[-2:]])

        def pooled(name: str, x: Tensor, y: Tensor) -> Tensor:
            return _global_pooling(at(name, x), at(name, y), known[_LEVEL[name]])

        def cell(name: str, x: Tensor) -> Tensor:
            conv = pick(self.convs, _CELLS.index(name))
            mask = known[_LEVEL[name]]
            return self.norms[name](conv(blank(F.relu(x), mask)), mask)

        def summed(name: str, x: Tensor, y: Tensor) -> Tensor:
            return cell(name, at(name, x) + at(name, y))

        p3, p4, p5, p6, p7 = levels
        p4a = cell("p4a", pooled("p4a", p6, p4))
        p4b = summed("p4b", p4a, p4)
        p3 = summed("p3", p4b, p3)
        p4 = summed("p4", p3, p4b)
        p5 = summed("p5", p5, pooled("p5", p4, p3))
        p7 = summed("p7", p7, pooled("p7", p5, p4b))
        p6 = cell("p6", pooled("p6", p7, p5))
        return [p3, p4, p5, p6, p7]

    @torch.no_grad()
    def zero_init_(self) -> None:
        """Let the output be zero; the inner cells of P4 go on."""
        for name in ("p3", "p4", "p5", "p6", "p7"):
            self.norms[name].weight.zero_()  # pyright: ignore


def _to_size(x: Tensor, size: torch.Size, mask: Tensor | None) -> Tensor:
    if x.shape[-2:] != size and all(a >= b for a, b in zip(x.shape[-2:], size, strict=True)):
        return max_pool(x, mask, partial(F.adaptive_max_pool2d, output_size=size))
    return resize(x, size, "nearest")


def _global_pooling(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """The sum y + sigmoid(mean of y) * x, with the mean taken over the image."""
    if mask is None:
        mean = y.mean((2, 3), keepdim=True)
    else:
        mean = blank(y, mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True)
    return y + torch.sigmoid(mean) * x
