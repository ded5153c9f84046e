"""What the designs of G are built from: convolutions, resizing, and the residual block of one level (RBL).

Shapes: B batch, C channels, L levels; level j is (B, C, H_j, W_j), coarser levels have the larger index.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from torchvision.ops import deform_conv2d

import deqkit
from adapters.detection.necks.norms import GroupNorm, blank, group_count

__all__ = [
    "DeformableConv",
    "ResidualBlock",
    "autocast_enabled",
    "channel_dropout",
    "conv",
    "group_count",
    "max_pool",
    "normalise_weights_",
    "one_of",
    "pick",
    "resize",
    "zero_convs_",
]

_STD = 0.01


def conv(channels: int, kernel_size: int = 3, stride: int = 1, bias: bool = True, out: int | None = None) -> nn.Conv2d:
    """A convolution with weights from N(0, 0.01) and bias 0.

    This small scale is what makes the iteration contract at the start of training; Kaiming's would not.

    Args:
        channels: Width C of the input.
        kernel_size: 1 or 3; the padding keeps the size.
        stride: 1 or 2.
        bias: Whether there is one.
        out: Width of the output; None for C.
    """
    return _small(nn.Conv2d(channels, out or channels, kernel_size, stride, kernel_size // 2, bias=bias))


def _small(module: nn.Conv2d) -> nn.Conv2d:
    nn.init.normal_(module.weight, std=_STD)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class DeformableConv(nn.Conv2d):
    """3x3 convolution that can sample off its grid: DCNv1 (arXiv 1703.06211), as SEPC has it.

    The offsets come from a 3x3 convolution that starts at zero, so that it starts as the ordinary convolution.

    Args:
        channels: Width C of input and output.
        stride: 1 or 2.
    """

    def __init__(self, channels: int, stride: int = 1):
        super().__init__(channels, channels, 3, stride, 1)
        _small(self)
        self.offset = nn.Conv2d(channels, 2 * 3 * 3, 3, stride, 1)
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)

    def forward(self, input: Tensor, deform: bool = True) -> Tensor:
        """Convolve.

        Args:
            input: Map of shape (B, C, H, W).
            deform: False convolves on the grid, with the same weights.
        """
        if not deform:
            return super().forward(input)
        offset = self.offset(input)
        # Positions need float32, and the operator has no bfloat16 everywhere.
        dtype = torch.promote_types(input.dtype, torch.float32)
        x, at, weight = (t.to(dtype) for t in (input, offset, self.weight))
        bias = None if self.bias is None else self.bias.to(dtype)
        device = input.device.type
        with torch.autocast(device, enabled=False) if autocast_enabled(device) else contextlib.nullcontext():
            out = deform_conv2d(x, at, weight, bias, self.stride, self.padding)  # pyright: ignore[reportArgumentType]
        return out.to(offset.dtype)


def autocast_enabled(device: str) -> bool:
    """Whether operations on a type of device are autocast now."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def pick(modules: nn.ModuleList, index: int) -> nn.Module:
    """The module of a level, or the only one where it is shared."""
    return modules[index] if len(modules) > 1 else modules[0]


def resize(x: Tensor, size: Sequence[int], mode: str = "bilinear", mask: Tensor | None = None) -> Tensor:
    """Resize a map to a target size; a map that has it already comes back as it is.

    The target is always a size and never a factor: pyramids of padded images go 25 -> 13 -> 7.

    Args:
        x: Map of shape (B, C, h, w).
        size: Target `(H, W)`.
        mode: "bilinear" or "nearest".
        mask: Where the image is, (B, 1, h, w). At its edge the interpolation then takes the pixels inside alone, as
            it does at the border of a map. (The nearest pixel is inside anyway.)

    Returns:
        Map of shape (B, C, H, W).
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    interpolate = partial(
        F.interpolate, size=tuple(size), mode=mode, align_corners=False if mode == "bilinear" else None
    )
    if mask is None or mode == "nearest":
        return interpolate(x)
    inside = interpolate(mask.to(x.dtype))  # the part of every pixel's weights that falls on the image
    return interpolate(blank(x, mask)) / inside.clamp(min=torch.finfo(x.dtype).eps)


def max_pool(x: Tensor, mask: Tensor | None, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """Max pooling over the image alone: its padding, which holds zeros, would outdo negative numbers.

    Args:
        x: Map of shape (B, C, H, W).
        mask: Where the image is, (B, 1, H, W); None if nothing is padded.
        pool: The pooling.

    Returns:
        The pooled map; zero where there is no image to pool.
    """
    if mask is None:
        return pool(x)
    inside = torch.where(mask, x, -torch.inf)  # in x's memory format, which masked_fill does not keep
    return blank(pool(inside), pool(mask.to(x.dtype)) > 0)


def zero_convs_(modules: Iterable[nn.Module]) -> None:
    """Set weight and bias of convolutions to zero; the offsets of deformable ones stay."""
    for module in modules:
        assert isinstance(module, nn.Conv2d)
        if is_parametrized(module, "weight"):
            module.weight = torch.zeros_like(module.weight)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            module.weight.zero_()
        if module.bias is not None:
            module.bias.zero_()


def normalise_weights_(module: nn.Module) -> None:
    """Weight normalisation (arXiv 1602.07868), one length per output channel, of every convolution in `module`.

    The convolutions that give the offsets of deformable ones are left out: they start at zero and are no part of W.
    """
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.Conv2d) and not name.endswith("offset"):
            deqkit.nn.weight_norm(part)


def channel_dropout(rate: float) -> nn.Module:
    """Variational dropout of whole channels: a mask (B, C, 1, 1), the same in all evaluations of a solve.

    Raises:
        TypeError: If the rate is not a number.
        ValueError: If it is not a probability.
    """
    return deqkit.nn.VariationalDropout(rate, shared_dims=(2, 3))


class ResidualBlock(nn.Module):
    """Residual block of one level (RBL): conv3x3-GN-ReLU-conv3x3-GN, identity shortcut, ReLU.

    The basic block of ResNet with group normalisation (arXiv 2012.13563, section 3.2.2). No statistics are
    kept and nothing is random within a solve, so the same input always gives the same output: a fixed point needs that.

    Args:
        channels: Width C of input and output. See `group_count` for the number of groups.
        dropout: Rate of variational dropout, of channels after the second convolution (as in MDEQ).
    """

    def __init__(self, channels: int, dropout: float = 0.0):
        super().__init__()
        # GroupNorm has its own shift: a bias before it would have no effect.
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = GroupNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.dropout = channel_dropout(dropout)
        self.norm2 = GroupNorm(channels)
        for module in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the block.

        Args:
            x: Map of shape (B, C, H, W), zero in the padding.
            mask: Where the image is, (B, 1, H, W); None if nothing is padded.

        Returns:
            Map of the same shape, zero in the padding.
        """
        out = F.relu(self.norm1(self.conv1(x), mask))
        out = self.norm2(self.dropout(self.conv2(out)), mask)
        return F.relu(out + x)


def one_of(name: str, value: Any, accepted: Sequence[Any]) -> None:
    """Refuse a setting that is none of the accepted values.

    Raises:
        ValueError: Naming them.
    """
    if value not in accepted:
        raise ValueError(f"unknown {name} {value!r}; accepted: {', '.join(map(repr, accepted))}")
