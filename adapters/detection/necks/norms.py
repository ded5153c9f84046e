"""Normalisations inside G, and how they tell the image from its padding.

torchvision pads the images of a batch to one size. Statistics taken over the padding make P* depend on it, so every
norm here takes a mask: statistics come from the image alone, and the padding comes out as zero, which is what a
convolution sees beyond the border of an image that was never padded.

Integrated norms (SEPC, arXiv 2005.03101, section 3.2) share their statistics over the levels: the maps are laid side by
side as one map of all their pixels.

Shapes: B batch, C channels, L levels; a map is (B, C, H, W), its mask (B, 1, H, W), bool, True inside the image.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["OUT_NORMS", "GroupNorm", "IntegratedBatchNorm", "IntegratedGroupNorm", "LevelGroupNorm"]

Masks = Sequence[Tensor]
"""One mask per level."""

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


def padding_masks(
    image_sizes: Sequence[tuple[int, int]], padded_size: tuple[int, int], levels: Sequence[Tensor]
) -> list[Tensor]:
    """Which pixels of every level belong to the images and not to their padding.

    A level of height H of a batch padded to height P keeps ceil(h * H / P) rows of an image of height h.

    Args:
        image_sizes: `(h, w)` of every image before it was padded.
        padded_size: `(h, w)` of the batch.
        levels: Maps of shapes (B, C, H_j, W_j).

    Returns:
        A mask of shape (B, 1, H_j, W_j) for each level.

    Raises:
        ValueError: If there are not B sizes, or one exceeds the padded size.
    """
    if len(image_sizes) != levels[0].shape[0]:
        raise ValueError(f"got {len(image_sizes)} image sizes for a batch of {levels[0].shape[0]}")
    if any(not 0 < s <= p for size in image_sizes for s, p in zip(size, padded_size, strict=True)):
        raise ValueError(f"image sizes must be positive and fit into {tuple(padded_size)}, got {list(image_sizes)}")
    return [_mask(image_sizes, padded_size, level) for level in levels]


def _mask(image_sizes: Sequence[tuple[int, int]], padded_size: tuple[int, int], level: Tensor) -> Tensor:
    inside = []
    for axis in (0, 1):
        length, padded = level.shape[2 + axis], padded_size[axis]
        kept = [-(-size[axis] * length // padded) for size in image_sizes]
        index = torch.arange(length, device=level.device)
        inside.append(index < torch.tensor(kept, device=level.device).view(-1, 1))
    rows, columns = inside
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)


def each(masks: Masks | None, num_levels: int) -> Sequence[Tensor | None]:
    """The mask of every level, which is None where nothing is padded."""
    return [None] * num_levels if masks is None else masks


def blank(x: Tensor, mask: Tensor | None) -> Tensor:
    """The map with zeros in its padding."""
    return x if mask is None else torch.where(mask, x, 0.0)


class GroupNorm(nn.GroupNorm):
    """GroupNorm whose statistics come from the image alone where there is a mask.

    Args:
        channels: Width C. See `group_count` for the number of groups.
    """

    def __init__(self, channels: int):
        super().__init__(group_count(channels), channels)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise a map.

        Args:
            input: Map of shape (B, C, H, W).
            mask: Its mask; None if nothing is padded.

        Returns:
            Map of the same shape, zero in the padding.
        """
        if mask is None:
            return super().forward(input)
        x = _widened(input)
        grouped = x.unflatten(1, (self.num_groups, -1))
        mean, variance = _moments(grouped, mask.unsqueeze(1), dim=(2, 3, 4))
        out = ((grouped - mean) * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        return blank(_scaled(out, self.weight, self.bias), mask).to(input.dtype)


class LevelGroupNorm(nn.Module):
    """GroupNorm after the sum, every level by itself, with scale and shift of its own.

    Args:
        channels: Width C.
        num_levels: Number of levels L.
    """

    def __init__(self, channels: int, num_levels: int):
        super().__init__()
        self.norms = nn.ModuleList(GroupNorm(channels) for _ in range(num_levels))

    def forward(self, levels: Sequence[Tensor], masks: Masks | None = None) -> list[Tensor]:
        """Normalise L maps; see `GroupNorm`."""
        return [norm(x, m) for norm, x, m in zip(self.norms, levels, each(masks, len(levels)), strict=True)]

    @torch.no_grad()
    def zero_init_(self) -> None:
        """Let the output be zero."""
        for norm in self.norms:
            norm.weight.zero_()  # pyright: ignore[reportCallIssue]


class IntegratedGroupNorm(nn.Module):
    """GroupNorm after the sum, with statistics per sample over the pixels of all levels.

    Args:
        channels: Width C.
        num_levels: Number of levels L; any number goes through.
    """

    def __init__(self, channels: int, num_levels: int):
        super().__init__()
        self.norm = GroupNorm(channels)

    def forward(self, levels: Sequence[Tensor], masks: Masks | None = None) -> list[Tensor]:
        """Normalise L maps; see `GroupNorm`."""
        return _side_by_side(self.norm, levels, masks)

    @torch.no_grad()
    def zero_init_(self) -> None:
        """Let the output be zero."""
        self.norm.weight.zero_()


class IntegratedBatchNorm(nn.Module):
    """Integrated batch normalisation (iBN) after the sum: one BatchNorm over the pixels of all levels (SEPC).

    In training mode its statistics tie the samples of a batch together: a solve must treat the batch as one system.
    G is evaluated many times in one forward pass, most of them away from P*. The running statistics are therefore
    not touched by an evaluation; `update_running_stats`, called once per forward pass, takes those of the last one.
    Statistics are those of one process: ranks may take different numbers of steps, so that none may wait for another.

    Args:
        channels: Width C.
        num_levels: Number of levels L; any number goes through.
        momentum: Weight of the new statistics in the running ones.
        eps: Added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, num_levels: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self._last: tuple[Tensor, Tensor] | None = None

    def forward(self, levels: Sequence[Tensor], masks: Masks | None = None) -> list[Tensor]:
        """Normalise L maps, by the statistics of the batch in training mode and by the running ones otherwise."""
        return _side_by_side(self._normalise, levels, masks)

    def _normalise(self, input: Tensor, mask: Tensor | None) -> Tensor:
        if not self.training or input.numel() == 0:
            out = F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
            return blank(out, mask)
        x = _widened(input)
        mean, variance = _moments(x, mask, dim=(0, 2, 3))
        self._last = mean.detach().flatten(), _unbiased(variance.detach().flatten(), x, mask)
        out = (x - mean) * torch.rsqrt(variance + self.eps)
        return blank(_scaled(out, self.weight, self.bias), mask).to(input.dtype)

    @torch.no_grad()
    def update_running_stats(self) -> None:
        """Move the running statistics towards those of the last evaluation in training mode, if there was one."""
        if self._last is None:
            return
        for running, new in zip((self.running_mean, self.running_var), self._last, strict=True):
            running.lerp_(new.to(running.dtype), self.momentum)
        self.num_batches_tracked += 1
        self._last = None

    @torch.no_grad()
    def zero_init_(self) -> None:
        """Let the output be zero."""
        self.weight.zero_()


OUT_NORMS: dict[str, type[nn.Module]] = {
    "gn": LevelGroupNorm,
    "integrated_gn": IntegratedGroupNorm,
    "ibn": IntegratedBatchNorm,
}
"""The normalisations after the sum over the levels that can be asked for by name."""


def _side_by_side(
    norm: Callable[[Tensor, Tensor | None], Tensor], levels: Sequence[Tensor], masks: Masks | None
) -> list[Tensor]:
    """Apply a norm to all levels laid side by side, (B, C, 1, all pixels), in the memory format that they have."""
    # Joined and parted with four dims: with three there is no memory format to keep, forward or backward.
    pixels = torch.cat([x.flatten(2).unsqueeze(2) for x in levels], dim=3)
    mask = None if masks is None else torch.cat([m.flatten(2).unsqueeze(2) for m in masks], dim=3)
    out = norm(pixels, mask).split([x.shape[2] * x.shape[3] for x in levels], dim=3)
    return [o.squeeze(2).unflatten(2, x.shape[-2:]) for o, x in zip(out, levels, strict=True)]


def _widened(x: Tensor) -> Tensor:
    """In float32 at least, as torch's own norms compute their statistics."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _moments(x: Tensor, mask: Tensor | None, dim: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance inside the image, with the dims kept."""
    if mask is None:
        variance, mean = torch.var_mean(x, dim=dim, correction=0, keepdim=True)
        return mean, variance
    count = mask.expand_as(x).sum(dim, keepdim=True)
    mean = blank(x, mask).sum(dim, keepdim=True) / count
    return mean, blank(x - mean, mask).square().sum(dim, keepdim=True) / count


def _unbiased(variance: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    count = torch.tensor(x.numel() // x.shape[1]) if mask is None else mask.sum()
    return variance * (count / (count - 1).clamp(min=1)).to(variance)


def _scaled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addcmul(bias.view(-1, 1, 1), x, weight.view(-1, 1, 1))
