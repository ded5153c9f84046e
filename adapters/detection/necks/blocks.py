"""The nonlinear transformation G of the implicit FPN and the blocks it is built from.

With `Z_j` the input of level j (level 0 is the finest), i-FPN (arXiv 2012.13563, Eq. 8) computes

    O_i = sum over j = i-1 .. i+1 of W_ij(R_j(Z_j))

where `R_j` is the residual block of level j (RBL) and `W_ij` the cross-scale connection (CSC) from level j to
level i. `R_j` works on one level, a CSC mixes levels: `NonlinearTransform` composes the two. A new CSC is one
class with the signature of `CrossScaleFactory` and one line in `CROSS_SCALE_CONNECTIONS`.

Shapes: B batch, C channels, L levels; level j is (B, C, H_j, W_j), coarser levels have the larger index.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "CROSS_SCALE_CONNECTIONS",
    "CrossScaleFactory",
    "NonlinearTransform",
    "PyramidConv",
    "ResidualBlock",
]

_MAX_GROUPS = 32
_MIN_GROUP_SIZE = 8


def group_count(channels: int) -> int:
    """Number of GroupNorm groups for a width: the paper's 32, fewer where that makes the groups too small.

    The paper's 256 channels give 32 groups of 8 channels. Narrower necks keep the groups of 8 rather than the
    32 groups, because the last levels of a pyramid have one or four pixels and a group of two channels on one
    pixel is always normalised to (-1, 1) or (1, -1): G would jump where the two values cross, and the
    iteration would not settle (64 channels, levels 8x8 to 1x1, rtol 1e-3 in 15 steps: 7 samples of 24
    are solved with 32 groups, 23 with 8).

    Args:
        channels: Width C of the normalised tensor.

    Returns:
        The largest divisor of C that is at most 32 and leaves 8 channels or more in a group; 1 if there is
        none.
    """
    candidates = range(min(_MAX_GROUPS, channels // _MIN_GROUP_SIZE), 0, -1)
    return next((groups for groups in candidates if channels % groups == 0), 1)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a map bilinearly to a target size; a map that has it already comes back as it is.

    The target is always a size and never a factor: pyramids of padded images go 25 -> 13 -> 7.

    Args:
        x: Map of shape (B, C, h, w).
        size: Target `(H, W)`.

    Returns:
        Map of shape (B, C, H, W).
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class ResidualBlock(nn.Module):
    """Residual block of one level (RBL): conv3x3-GN-ReLU-conv3x3-GN, identity shortcut, ReLU.

    The basic block of ResNet with group normalisation (arXiv 2012.13563, section 3.2.2). No statistics are
    kept and nothing is random, so the same input always gives the same output: a fixed point needs that.

    Args:
        channels: Width C of input and output. See `group_count` for the number of groups.
    """

    def __init__(self, channels: int):
        super().__init__()
        groups = group_count(channels)
        # GroupNorm has its own shift: a bias before it would have no effect.
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, channels)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: Map of shape (B, C, H, W).

        Returns:
            Map of the same shape.
        """
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + x)


class PyramidConv(nn.Module):
    """Pyramid convolution, the cross-scale connection (c) of the paper (Fig. 4c and Eq. 8).

    Every level hears from itself and its two neighbours:

        O_i = same(R_i) + resize(up(R_{i+1})) + down(R_{i-1})

    `same` and `up` are 3x3 convolutions with padding 1, `down` is a 3x3 convolution with stride 2 and padding
    1. `up` convolves at the coarse size and is then resized bilinearly to the size of level i. The output of
    `down` already has the size of level i for pyramids that halve (rounding up); any other size is reached
    bilinearly too. The paper describes `same` and `up` only; `down` and the sharing over levels follow SEPC
    (arXiv 2005.03101), on which this connection is based.

    Weights are drawn from N(0, 0.01), biases are 0. This small scale is what makes the iteration contract at
    the start of training; Kaiming's would not.

    Args:
        channels: Width C of every level.
        num_levels: Number of levels L. For L = 1 only `same` exists, so that no parameter goes unused.
        share: True: one `same`, one `up` and one `down` for all levels, as in SEPC. False: each pair of
            levels has its own.

    Raises:
        ValueError: If `num_levels` is less than 1.
    """

    def __init__(self, channels: int, num_levels: int, *, share: bool = True):
        super().__init__()
        if num_levels < 1:
            raise ValueError(f"num_levels must be at least 1, got {num_levels}")
        self.num_levels = num_levels
        num_pairs = num_levels - 1
        self.same = self._convs(channels, 1 if share else num_levels, stride=1)
        self.up = self._convs(channels, min(num_pairs, 1) if share else num_pairs, stride=1)
        self.down = self._convs(channels, min(num_pairs, 1) if share else num_pairs, stride=2)

    @staticmethod
    def _convs(channels: int, count: int, stride: int) -> nn.ModuleList:
        convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, stride=stride, padding=1) for _ in range(count))
        for conv in convs:
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        return convs

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Mix the levels.

        Args:
            levels: L maps of shapes (B, C, H_j, W_j), finest first. The sizes are free.

        Returns:
            L maps of the same shapes.
        """
        last = self.num_levels - 1
        out = []
        for i, x in enumerate(levels):
            total = _pick(self.same, i)(x)
            if i < last:
                total = total + resize(_pick(self.up, i)(levels[i + 1]), x.shape[-2:])
            if i > 0:
                total = total + resize(_pick(self.down, i - 1)(levels[i - 1]), x.shape[-2:])
            out.append(total)
        return out


def _pick(modules: nn.ModuleList, index: int) -> nn.Module:
    """The module of a level, or the only one where it is shared."""
    return modules[index] if len(modules) > 1 else modules[0]


class CrossScaleFactory(Protocol):
    """What builds a cross-scale connection: a module that maps L level maps to L maps of the same shapes."""

    def __call__(self, channels: int, num_levels: int, *, share: bool) -> nn.Module:
        """Build the connection of `num_levels` levels, with weights shared over levels or not."""
        ...


CROSS_SCALE_CONNECTIONS: Mapping[str, CrossScaleFactory] = {"pyramid": PyramidConv}
"""The cross-scale connections that can be asked for by name."""


class NonlinearTransform(nn.Module):
    """The nonlinear transformation G: a residual block on every level, then a cross-scale connection (Eq. 8).

    Args:
        channels: Width C of every level.
        num_levels: Number of levels L.
        cross_scale: Name of a cross-scale connection (see `CROSS_SCALE_CONNECTIONS`) or a factory
            `(channels, num_levels, *, share) -> nn.Module`.
        share_rbl: Use one residual block for all levels instead of one per level.
        share_csc: Share the weights of the cross-scale connection over levels.

    Raises:
        ValueError: If `cross_scale` is a name that is not known.
    """

    def __init__(
        self,
        channels: int,
        num_levels: int,
        *,
        cross_scale: str | CrossScaleFactory = "pyramid",
        share_rbl: bool = False,
        share_csc: bool = True,
    ):
        super().__init__()
        factory = _cross_scale_factory(cross_scale)
        self.num_levels = num_levels
        num_blocks = 1 if share_rbl else num_levels
        self.residual_blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(num_blocks))
        self.cross_scale = factory(channels, num_levels, share=share_csc)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Compute G(Z).

        Args:
            levels: Z, L maps of shapes (B, C, H_j, W_j), finest first.

        Returns:
            L maps of the same shapes.

        Raises:
            ValueError: If the number of maps is not L.
        """
        if len(levels) != self.num_levels:
            raise ValueError(f"G was built for {self.num_levels} levels, got {len(levels)}")
        refined = [_pick(self.residual_blocks, j)(z) for j, z in enumerate(levels)]
        return self.cross_scale(refined)


def _cross_scale_factory(cross_scale: str | CrossScaleFactory) -> Callable[..., nn.Module]:
    if not isinstance(cross_scale, str):
        if not callable(cross_scale):
            raise ValueError(f"cross_scale must be a name or a factory, got {cross_scale!r}")
        return cross_scale
    if cross_scale not in CROSS_SCALE_CONNECTIONS:
        known = ", ".join(repr(name) for name in CROSS_SCALE_CONNECTIONS)
        raise ValueError(f"unknown cross_scale {cross_scale!r}; known names: {known}, or pass a factory")
    return CROSS_SCALE_CONNECTIONS[cross_scale]
