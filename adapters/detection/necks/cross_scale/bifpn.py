"""One BiFPN layer as cross-scale connection (EfficientDet, arXiv 1911.09070, section 3; Table 4 of i-FPN).

With levels 0 (finest) to N, N = L - 1:

    T_N = R_N,   T_i = node(R_i, up(T_{i+1}))             i = N-1 .. 0   (top-down)
    O_0 = T_0,   O_i = node(R_i, T_i, down(O_{i-1}))      i = 1 .. N-1   (bottom-up)
                 O_N = node(R_N, down(O_{N-1}))

    node(x_1, ..., x_k) = GN(pointwise(depthwise3x3(swish(sum_m w_m x_m))))
    w_m = relu(v_m) / (sum_n relu(v_n) + 1e-4)

`up` is nearest, `down` a max pooling 3x3 with stride 2 and padding 1; sizes that do not halve are reached by nearest
interpolation. Deviation: GN in place of EfficientDet's BN, whose batch statistics have no place inside a fixed point.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.detection.necks.blocks import max_pool, pick, resize
from adapters.detection.necks.norms import GroupNorm, Masks, blank, each

__all__ = ["BiFPNConnection"]

_EPS = 1e-4
_HALVE = partial(F.max_pool2d, kernel_size=3, stride=2, padding=1)


class BiFPNConnection(nn.Module):
    """BiFPN connection.

    Args:
        channels: Width C of every level.
        num_levels: Number of levels L, 2 or more.
        share: False (as None): every node has its own weights, as in EfficientDet. True: one separable convolution for
            the top-down nodes and one for the bottom-up ones; norms and fusion weights stay with their nodes.

    Raises:
        ValueError: If there are less than 2 levels.
    """

    def __init__(self, channels: int, num_levels: int, *, share: bool | None = None):
        super().__init__()
        if num_levels < 2:
            raise ValueError(f"cross_scale='bifpn' fuses 2 levels or more, got {num_levels}")
        self.num_levels = num_levels
        pairs = num_levels - 1
        count = 1 if share else pairs
        self.top_down_convs = nn.ModuleList(_separable_conv(channels) for _ in range(count))
        self.bottom_up_convs = nn.ModuleList(_separable_conv(channels) for _ in range(count))
        # Entry i belongs to T_i, and to O_{i+1}.
        self.top_down = nn.ModuleList(_Fusion(channels, 2) for _ in range(pairs))
        self.bottom_up = nn.ModuleList(_Fusion(channels, 3 if i < pairs - 1 else 2) for i in range(pairs))

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
        down = list(levels)
        for i in reversed(range(last)):
            above = resize(down[i + 1], levels[i].shape[-2:], "nearest")
            down[i] = self.top_down[i]([levels[i], above], pick(self.top_down_convs, i), known[i])
        out = down[:1]
        for i in range(1, self.num_levels):
            below = resize(max_pool(out[-1], known[i - 1], _HALVE), levels[i].shape[-2:], "nearest")
            inputs = [levels[i], down[i], below] if i < last else [levels[i], below]
            out.append(self.bottom_up[i - 1](inputs, pick(self.bottom_up_convs, i - 1), known[i]))
        return out

    @torch.no_grad()
    def zero_init_(self) -> None:
        """Let the output be zero; the top-down nodes of the levels above the finest go on."""
        for fusion in (self.top_down[0], *self.bottom_up):
            fusion.norm.weight.zero_()  # pyright: ignore


class _Fusion(nn.Module):
    """Fusion weights and norm of a node."""

    def __init__(self, channels: int, num_inputs: int):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(num_inputs))
        self.norm = GroupNorm(channels)

    def forward(self, inputs: Sequence[Tensor], conv: nn.Module, mask: Tensor | None) -> Tensor:
        weights = F.relu(self.weights)
        weights = weights / (weights.sum() + _EPS)
        terms = [w * x for w, x in zip(weights.unbind(), inputs, strict=True)]
        return self.norm(conv(blank(F.silu(sum(terms[1:], start=terms[0])), mask)), mask)


def _separable_conv(channels: int) -> nn.Sequential:
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(channels, channels, 1, bias=False))
