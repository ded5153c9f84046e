"""Feature pyramids for the tests of the necks, and the operations of their blocks, written out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ODD = [(13, 18), (7, 9), (4, 5), (2, 3), (1, 2)]
SMALL = [(5, 6), (3, 4), (3, 3), (2, 3), (2, 2)]


def pyramid(channels: int, sizes=ODD, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(batch, channels, *size, dtype=dtype) for size in sizes]


def group_norm(x: Tensor, norm: torch.nn.GroupNorm) -> Tensor:
    grouped = x.reshape(x.shape[0], norm.num_groups, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = (grouped - mean).square().mean(2, keepdim=True)
    normed = ((grouped - mean) / (variance + norm.eps).sqrt()).reshape(x.shape)
    return normed * norm.weight[:, None, None] + norm.bias[:, None, None]


def nearest(x: Tensor, size) -> Tensor:
    rows, columns = ([i * n // m for i in range(m)] for n, m in zip(x.shape[-2:], size, strict=True))
    return x[:, :, rows][:, :, :, columns]


def bilinear(x: Tensor, size) -> Tensor:
    def weights(n: int, m: int) -> Tensor:
        out = torch.zeros(m, n, dtype=x.dtype)
        for i in range(m):
            at = min(max((i + 0.5) * n / m - 0.5, 0.0), n - 1.0)
            low = int(at)
            out[i, low] += 1 - (at - low)
            out[i, min(low + 1, n - 1)] += at - low
        return out

    rows, columns = (weights(n, m) for n, m in zip(x.shape[-2:], size, strict=True))
    return torch.einsum("ih,bchw,jw->bcij", rows, x, columns)


def largest_of_cells(x: Tensor, size) -> Tensor:
    """Adaptive max pooling."""
    (h, w), (m, n) = x.shape[-2:], size
    rows = [x[:, :, i * h // m : -(-(i + 1) * h // m)].amax(2) for i in range(m)]
    x = torch.stack(rows, dim=2)
    return torch.stack([x[..., j * w // n : -(-(j + 1) * w // n)].amax(3) for j in range(n)], dim=3)


def conv(x: Tensor, module: torch.nn.Conv2d, stride: int = 1) -> Tensor:
    return F.conv2d(x, module.weight, module.bias, stride, padding=module.weight.shape[-1] // 2)


def pointwise(x: Tensor, module: torch.nn.Conv2d) -> Tensor:
    out = torch.einsum("oi,bihw->bohw", module.weight[:, :, 0, 0], x)
    return out if module.bias is None else out + module.bias[:, None, None]


def residual_block(x: Tensor, block: torch.nn.Module) -> Tensor:
    hidden = group_norm(conv(x, block.conv1), block.norm1).clamp(min=0)
    return (group_norm(conv(hidden, block.conv2), block.norm2) + x).clamp(min=0)


def deformed(x: Tensor, module: torch.nn.Conv2d, stride: int = 1) -> Tensor:
    """DCNv1: every tap of the kernel looks where its offset points to; zero beyond the border."""
    offsets = conv(x, module.offset, stride)
    (h, w), (out_h, out_w) = x.shape[-2:], offsets.shape[-2:]
    total = module.bias[:, None, None].clone()
    for tap in range(9):
        y = torch.arange(out_h).view(-1, 1) * stride - 1 + tap // 3 + offsets[:, 2 * tap]
        x_ = torch.arange(out_w) * stride - 1 + tap % 3 + offsets[:, 2 * tap + 1]
        grid = torch.stack([(2 * x_ + 1) / w - 1, (2 * y + 1) / h - 1], dim=-1)
        seen = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        total = total + torch.einsum("oi,bihw->bohw", module.weight[:, :, tap // 3, tap % 3], seen)
    return total


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter away from its start, of which zeros and ones would hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module
