"""The block of multiscale deep equilibrium models (MDEQ, arXiv 2006.08656, section 3.1): the comparator of Table 5.

One residual block per level, then a fusion of all levels:

    H_j = gn3(ReLU(gn2(drop(conv3x3(ReLU(gn1(conv3x3(X_j))))) + B_j) + X_j))
    G_i = gn(conv1x1(ReLU(H_i + sum over j > i of up(H_j) + sum over j < i of down(H_j))))

The first convolution widens to `expansion` times C, the second comes back. `up` is conv1x1-GN and nearest upsampling,
`down` a conv3x3-GN with stride 2 per level, with a ReLU between two. No convolution has a bias; weights are drawn from
N(0, 0.01).

In an MDEQ X is the state P itself, and B is injected into every block. The "RLIter" row of the table is the same block
with the injection taken out and P + B for X. Deviations: the same number of GN groups everywhere (`group_count`), and
always with scale and shift.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.detection.necks.blocks import channel_dropout, conv, normalise_weights_, resize
from adapters.detection.necks.norms import GroupNorm, Masks, each

__all__ = ["MDEQTransform"]


class MDEQTransform(nn.Module):
    """G after MDEQ.

    Args:
        channels: Width C of every level.
        num_levels: Number of levels L.
        injection: True: called with P, into which B is injected. False: called with P + B.
        expansion: Width inside the residual blocks, relative to C.
        weight_norm: Weight normalisation of every convolution.
        dropout: Rate of variational dropout, see `drop` above.

    Attributes:
        injects: Whether it is to be called with P and B rather than with P + B.

    Raises:
        ValueError: If `num_levels` or `expansion` is less than 1.
    """

    def __init__(
        self,
        channels: int,
        num_levels: int,
        *,
        injection: bool = True,
        expansion: int = 5,
        weight_norm: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        for name, value in (("num_levels", num_levels), ("expansion", expansion)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_levels, self.injects = num_levels, injection
        levels = range(num_levels)
        self.branches = nn.ModuleList(_Branch(channels, expansion, dropout) for _ in levels)
        # Entry "i_j" leads from level j to level i.
        self.fuse = nn.ModuleDict({f"{i}_{j}": _way(channels, i - j) for i in levels for j in levels if i != j})
        self.post = nn.ModuleList(_ConvNorm(channels, 1) for _ in levels)
        if weight_norm:
            normalise_weights_(self)

    def forward(
        self, levels: Sequence[Tensor], masks: Masks | None = None, injection: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Compute G.

        Args:
            levels: P or P + B, L maps of shapes (B, C, H_j, W_j), finest first, zero in the padding.
            masks: Where the images are, one (B, 1, H_j, W_j) per level; None if nothing is padded.
            injection: B, likewise; None without injection.

        Returns:
            L maps of the same shapes.

        Raises:
            ValueError: If the number of maps is not L.
        """
        if len(levels) != self.num_levels:
            raise ValueError(f"G was built for {self.num_levels} levels, got {len(levels)}")
        known = each(masks, self.num_levels)
        parts = zip(self.branches, levels, injection or [None] * self.num_levels, known, strict=True)
        hidden = [branch(x, b, mask) for branch, x, b, mask in parts]
        out = []
        for i, h in enumerate(hidden):
            total = h
            for j, other in enumerate(hidden):
                if j != i:
                    total = total + self._term(i, j, other, [x.shape[-2:] for x in levels], known)
            out.append(self.post[i](F.relu(total), known[i]))
        return out

    def _term(self, i: int, j: int, x: Tensor, sizes: Sequence[torch.Size], masks: Sequence[Tensor | None]) -> Tensor:
        way = cast(nn.ModuleList, self.fuse[f"{i}_{j}"])
        if j > i:
            return resize(way[0](x, masks[j]), sizes[i], "nearest")
        for level, module in enumerate(way, start=j + 1):
            x = module(x, masks[level], sizes[level])
            x = F.relu(x) if level < i else x
        return x

    @torch.no_grad()
    def zero_init_(self) -> None:
        """Let the output be zero."""
        for module in self.post:
            module.norm.weight.zero_()  # pyright: ignore


class _Branch(nn.Module):
    """Residual block of one level."""

    def __init__(self, channels: int, expansion: int, dropout: float):
        super().__init__()
        width = channels * expansion
        self.conv1 = conv(channels, bias=False, out=width)
        self.norm1 = GroupNorm(width)
        self.conv2 = conv(width, bias=False, out=channels)
        self.dropout = channel_dropout(dropout)
        self.norm2, self.norm3 = GroupNorm(channels), GroupNorm(channels)

    def forward(self, x: Tensor, injection: Tensor | None, mask: Tensor | None) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x), mask))
        out = self.dropout(self.conv2(out))
        if injection is not None:
            out = out + injection
        return self.norm3(F.relu(self.norm2(out, mask) + x), mask)


class _ConvNorm(nn.Module):
    def __init__(self, channels: int, kernel_size: int, stride: int = 1):
        super().__init__()
        self.conv = conv(channels, kernel_size, stride, bias=False)
        self.norm = GroupNorm(channels)

    def forward(self, x: Tensor, mask: Tensor | None, size: Sequence[int] | None = None) -> Tensor:
        x = self.conv(x)
        return self.norm(x if size is None else resize(x, size), mask)


def _way(channels: int, distance: int) -> nn.ModuleList:
    if distance < 0:
        return nn.ModuleList([_ConvNorm(channels, 1)])
    return nn.ModuleList(_ConvNorm(channels, 3, stride=2) for _ in range(distance))
