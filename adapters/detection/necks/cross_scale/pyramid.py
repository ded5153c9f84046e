"""Pyramid convolution, the cross-scale connection (c) of i-FPN (arXiv 2012.13563, Fig. 4c and Eq. 8).

Every level hears from itself and its two neighbours:

    O_i = same(R_i) + resize(up(R_{i+1})) + down(R_{i-1})

`same` and `up` are 3x3 convolutions with padding 1, `down` is a 3x3 convolution with stride 2 and padding 1. `up`
convolves at the coarse size and is then resized bilinearly to the size of level i. The output of `down` already has the
size of level i for pyramids that halve (rounding up); any other size is reached bilinearly too. The paper describes
`same` and `up` only; `down`, the sharing over levels and the levels where kernels are deformable follow SEPC (arXiv
2005.03101), on which this connection is based.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adapters.detection.necks.blocks import DeformableConv, conv, pick, resize, zero_convs_
from adapters.detection.necks.norms import Masks, each

__all__ = ["PyramidConv"]


class PyramidConv(nn.Module):
    """Pyramid convolution.

    Args:
        channels: Width C of every level.
        num_levels: Number of levels L. For L = 1 only `same` exists, so that no parameter goes unused.
        share: True (as None): one `same`, one `up` and one `down` for all levels, as in SEPC. False: each pair of
            levels has its own.
        deformable: Deformable kernels (DCNv1) for all outputs but that of the finest level. It takes two levels or
            more.

    Raises:
        ValueError: If `num_levels` is less than 1.
    """

    def __init__(self, channels: int, num_levels: int, *, share: bool | None = None, deformable: bool = False):
        super().__init__()
        if num_levels < 1:
            raise ValueError(f"num_levels must be at least 1, got {num_levels}")
        self.num_levels, self.deformable = num_levels, deformable
        outputs = {"same": range(num_levels), "up": range(num_levels - 1), "down": range(1, num_levels)}
        if share is not False:
            # The last output stands for all of them: it is deformable if any is.
            outputs = {name: levels[-1:] for name, levels in outputs.items()}
        for name, levels in outputs.items():
            convs = (self._conv(channels, level, stride=2 if name == "down" else 1) for level in levels)
            self.add_module(name, nn.ModuleList(convs))

    def _conv(self, channels: int, level: int, stride: int) -> nn.Conv2d:
        """The convolution of one term of the output of a level."""
        return DeformableConv(channels, stride) if self.deformable and level > 0 else conv(channels, 3, stride)

    def forward(self, levels: Sequence[Tensor], masks: Masks | None = None) -> list[Tensor]:
        """Mix the levels.

        Args:
            levels: L maps of shapes (B, C, H_j, W_j), finest first. The sizes are free.
            masks: Where the images are, one (B, 1, H_j, W_j) per level; None if nothing is padded.

        Returns:
            L maps of the same shapes.
        """
        last = self.num_levels - 1
        known = each(masks, self.num_levels)
        out = []
        for i, x in enumerate(levels):
            total = self._term("same", i, i, x)
            if i < last:
                total = total + resize(self._term("up", i, i, levels[i + 1]), x.shape[-2:], mask=known[i + 1])
            if i > 0:
                total = total + resize(self._term("down", i - 1, i, levels[i - 1]), x.shape[-2:])
            out.append(total)
        return out

    def _term(self, name: str, index: int, level: int, x: Tensor) -> Tensor:
        module = pick(getattr(self, name), index)
        return module(x, level > 0) if isinstance(module, DeformableConv) else module(x)

    @torch.no_grad()
    def zero_init_(self) -> None:
        """Let the output be zero."""
        for name in ("same", "up", "down"):
            zero_convs_(getattr(self, name))
