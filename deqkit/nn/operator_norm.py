"""L6. Upper bounds of the spectral norm of a matrix and of a convolution, differentiable and without state.

Matrix. For A with singular values s_1 >= s_2 >= ... and p = 4 * 2^k

    s_1 <= (sum s_i^p)^(1/p) = |(A^H A)^(2^k)|_F^(2/p) <= n^(1/p) s_1,

n the smaller side of A: k squarings of the Gram matrix (Delattre et al., "Efficient Bound of Lipschitz Constant for
Convolutional Layers by Gram Iteration", ICML 2023, arXiv 2305.16173). k is such that n^(1/p) is at most 1.01. A power
iteration would be cheaper and bounds s_1 from below only: what is capped by it may lie above its cap.

Convolution, "fourier". On an infinite grid a convolution multiplies every frequency w by its symbol K(w), a matrix of
output by input channels, so its norm is sup |K(w)|_2. Zero padding, stride and a finite image only restrict inputs or
outputs of it, and circular padding (to the same size) only admits some frequencies: the bound holds for all sizes of
image. Dilation permutes frequencies; a transposed convolution is an adjoint, with the same norm. Between the points of
a grid of N frequencies per dimension, for a kernel of size k, the symbol exceeds its largest value on the grid by
at most

    product over dimensions of 1 / cos(pi (k - 1) / (2 N)),

since u^H K(w) v is, up to a phase, a function of exponential type (k - 1) / 2 in each frequency, and such a function of
type t with its maximum M at w0 is at least M cos(t (w - w0)) in absolute value near w0 (for trigonometric polynomials:
Ehlich & Zeller, Math. Z. 86, 1964). N = 8 (k - 1) makes that 1.02 per dimension. Only the largest matrix of the grid
is differentiated, as it alone determines the maximum.

Convolution, "reshaped". With R the weight as a matrix of output channels by input channels and taps, a convolution
applies R to every patch, and no pixel lies in more than T patches, so its norm is at most sqrt(T) |R|_2 (Tsuzuku et
al., "Lipschitz-Margin Training", NeurIPS 2018, arXiv 1802.04034); T is the number of taps, or with zero padding, stride
s and dilation d the product of ceil(k gcd(s, d) / s). Likewise for its adjoint, with R' of input channels by output
channels and taps: the smaller one counts. Cheap for any width, and up to sqrt(T) too large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SLACK = 1.01  # largest ratio of the bound of a matrix to its norm
_GRID = 8  # N / (k - 1)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def matrix_norm_bound(a: Tensor) -> Tensor:
    """An upper bound of the spectral norm, at most 1 percent above it.

    Args:
        a: matrices (..., m, n), in float32 or better.

    Returns:
        The bounds (...), real.
    """
    size = min(a.shape[-2:])
    squarings = 0 if size < 2 else math.ceil(math.log2(math.log(size) / math.log(_SLACK) / 4))
    scale = _frobenius(a).detach()
    a = _divide(a, scale)
    gram = a.mH @ a if a.shape[-1] <= a.shape[-2] else a @ a.mH
    return scale * _tame_sqrt(_gram_bound(gram.contiguous(), squarings))


def _gram_bound(gram: Tensor, squarings: int) -> Tensor:
    """The bound of positive semidefinite matrices. The scales drop out of its value, hence of its derivatives."""
    if not squarings:
        return _frobenius(gram)
    scale = _frobenius(gram).detach()
    gram = _divide(gram, scale)
    return scale * _tame_sqrt(_gram_bound(gram @ gram, squarings - 1))


def _frobenius(a: Tensor) -> Tensor:
    a = torch.view_as_real(a.resolve_conj()) if a.is_complex() else a.unsqueeze(-1)  # norms of complex ones are slow
    return torch.linalg.vector_norm(a, dim=(-3, -2, -1))


def _divide(a: Tensor, scale: Tensor) -> Tensor:
    return a / scale.clamp(min=torch.finfo(scale.dtype).tiny)[..., None, None]


def _tame_sqrt(x: Tensor) -> Tensor:
    """The square root, with a derivative of 0 at 0."""
    return torch.sqrt(x.clamp(min=torch.finfo(x.dtype).tiny))


@dataclass(frozen=True)
class Convolution:
    """What of a convolution, besides its weight, decides on its norm.

    Attributes:
        groups: number of groups of channels.
        repeat: after how many taps the next one lies on the same pixels of a patch further on, per dimension.
        circular: whether its padding is circular and not of zeros.
        bound: "fourier" or "reshaped".
    """

    groups: int
    repeat: tuple[int, ...]
    circular: bool
    bound: str

    @classmethod
    def of(cls, module: Any, bound: str) -> Convolution:
        """That of a module.

        Raises:
            ValueError: an unknown bound, padding that is neither of zeros nor circular, or circular padding that makes
                the image larger, by pixels that it then holds twice.
        """
        if bound not in ("fourier", "reshaped"):
            raise ValueError(f"unknown conv_bound {bound!r}: choose one of ['fourier', 'reshaped']")
        if module.padding_mode not in ("zeros", "circular"):
            raise ValueError(
                f"the norm of a convolution with padding_mode={module.padding_mode!r} is not bounded here: use 'zeros' "
                f"or 'circular'"
            )
        if module.padding_mode == "circular" and not isinstance(module.padding, str):
            lost = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            if any(2 * p > n for p, n in zip(module.padding, lost, strict=True)):
                raise ValueError(
                    f"circular padding of {module.padding} for a kernel of size {module.kernel_size} makes the image "
                    f"larger than it was: pad by dilation * (kernel_size - 1) / 2 at most"
                )
        repeat = tuple(s // math.gcd(s, d) for s, d in zip(module.stride, module.dilation, strict=True))
        return cls(module.groups, repeat, module.padding_mode == "circular", bound)

    def norm_bound(self, weight: Tensor) -> Tensor:
        """An upper bound of the norm of the operator, for images of any size.

        Args:
            weight: (out, in / groups, *kernel), or (in, out / groups, *kernel) of a transposed convolution; in float32
                or better.

        Returns:
            The bound, a real number.
        """
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])  # (groups, rows, columns, *kernel)
        return (self._fourier if self.bound == "fourier" else self._reshaped)(grouped).amax()

    def _fourier(self, grouped: Tensor) -> Tensor:
        kernel = grouped.shape[3:]
        grid = [max(1, _GRID * (k - 1)) for k in kernel]
        taps = grouped.flatten(3)
        waves = _waves(kernel, grid, grouped)
        with torch.no_grad():
            bounds = matrix_norm_bound(_symbol(taps, waves))
            group, frequency = torch.unravel_index(bounds.argmax(), bounds.shape)
        # Indexed by tensors: the device is not waited for.
        largest = _symbol(taps.index_select(0, group[None]), waves.index_select(0, frequency[None]))
        return matrix_norm_bound(largest) / math.prod(
            math.cos(math.pi * (k - 1) / (2 * n)) for k, n in zip(kernel, grid, strict=True)
        )

    def _reshaped(self, grouped: Tensor) -> Tensor:
        kernel = grouped.shape[3:]
        taps = math.prod(kernel)
        patches = math.prod(math.ceil(k / n) for k, n in zip(kernel, self.repeat, strict=True))
        by_row = matrix_norm_bound(grouped.flatten(2)) * math.sqrt(taps if self.circular else patches)
        by_column = matrix_norm_bound(grouped.transpose(1, 2).flatten(2)) * math.sqrt(taps)
        return torch.minimum(by_row, by_column)


def _waves(kernel: tuple[int, ...], grid: list[int], like: Tensor) -> Tensor:
    """exp(-i w t), (frequencies of the grid, taps of the kernel); of w and -w only one for a real weight."""
    phases = torch.zeros(1, 1, dtype=torch.float64, device=like.device)
    for dim, (k, n) in enumerate(zip(kernel, grid, strict=True)):
        half = dim == len(kernel) - 1 and not like.is_complex()
        w = torch.arange(n // 2 + 1 if half else n, device=like.device, dtype=torch.float64) * (2 * math.pi / n)
        t = torch.arange(k, device=like.device, dtype=torch.float64)
        phases = (phases[:, None, :, None] + torch.outer(w, t)[None, :, None, :]).flatten(0, 1).flatten(1)
    return torch.polar(torch.ones_like(phases), -phases).to(like.dtype.to_complex())


def _symbol(taps: Tensor, waves: Tensor) -> Tensor:
    """K(w), (groups, frequencies, rows, columns), of taps (groups, rows, columns, taps)."""
    symbol = waves @ taps.to(waves.dtype).flatten(0, 2).mT
    return symbol.reshape(-1, *taps.shape[:3]).transpose(0, 1).contiguous()
