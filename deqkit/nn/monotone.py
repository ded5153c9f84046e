"""L6. Monotone operator blocks: a unique fixed point for weights of any size.

With (Winston & Kolter, "Monotone Operator Equilibrium Networks", NeurIPS 2020, arXiv 2006.08591)

    W = (1 - m) I - A^T A + B - B^T,    m > 0,

I - W is strongly monotone, <x, (I - W) x> >= m |x|^2, and x = relu(W x + b + inputs) has exactly one solution, although
W may be large. The map relu(W x + ...) itself need not contract, and iterating it may well diverge. So what is built
here is the map of forward-backward splitting, which has the same fixed point:

    f(x) = relu(x - alpha ((I - W) x - b - inputs)),   |f(x) - f(y)|^2 <= (1 - 2 alpha m + alpha^2 L^2) |x - y|^2

for any L >= |I - W|_2. It contracts for 0 < alpha < 2 m / L^2, best at alpha = m / L^2, by sqrt(1 - m^2 / L^2).

Deliberate deviations: alpha is that best value for an upper bound L of the norm, computed from the weights once per
solve, and not searched for; zero padding in place of circular. alpha is a constant to the gradient: the fixed point
does not depend on it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deqkit import held
from deqkit.nn.contractive import same_padding
from deqkit.nn.operator_norm import Convolution, matrix_norm_bound
from deqkit.state import without_autocast


class _Monotone(nn.Module):
    """Forward-backward splitting for W made of a symmetric and an antisymmetric part."""

    symmetric: nn.Module  # A
    antisymmetric: nn.Module  # B

    def __init__(self, margin: float, bias: Tensor | None) -> None:
        super().__init__()
        if isinstance(margin, bool) or not isinstance(margin, (int, float)):
            raise TypeError(f"{type(self).__name__}: margin must be a number, got {margin!r}")
        if not (margin > 0 and math.isfinite(margin)):
            raise ValueError(f"{type(self).__name__}: margin must be positive and finite, got {margin}")
        self.margin = float(margin)
        self.bias = None if bias is None else nn.Parameter(bias)

    @abstractmethod
    def _residual_operator(self, x: Tensor) -> Tensor:
        """(A^T A - B + B^T) x, which is (I - W) x less m x."""

    @abstractmethod
    def _norm_bound(self) -> Tensor:
        """An upper bound of |I - W|_2."""

    def _lipschitz(self) -> Tensor:
        def compute() -> Tensor:
            with torch.no_grad():
                return self._norm_bound()

        weights = [self.symmetric.weight, self.antisymmetric.weight]
        return held.weight(self, weights, compute)  # pyright: ignore[reportArgumentType]

    @property
    def rate(self) -> float:
        """The factor by which f contracts, or a smaller one: sqrt(1 - m^2 / L^2)."""
        return math.sqrt(1 - (self.margin / float(self._lipschitz())) ** 2)

    def forward(self, x: Tensor, inputs: Tensor | float = 0.0) -> Tensor:
        """One evaluation of f.

        Args:
            x: the state, see the class.
            inputs: what is added before the activation; broadcast to the shape of x.

        Returns:
            f(x), of the shape of x.
        """
        step = (self.margin / self._lipschitz() ** 2).to(x.dtype)
        if self.bias is not None:
            inputs = inputs + self._shaped_bias(self.bias)
        return F.relu(x - step * (self.margin * x + self._residual_operator(x) - inputs))

    def _shaped_bias(self, bias: Tensor) -> Tensor:
        return bias

    def extra_repr(self) -> str:
        """Settings shown by print()."""
        return f"margin={self.margin}"


class MonotoneLinear(_Monotone):
    """A fully connected block with exactly one fixed point, x = relu(W x + b + inputs), for any values of its weights.

    W = (1 - m) I - A^T A + B - B^T may have any norm; f is not relu(W x + ...) itself but an averaged map with the same
    fixed point that contracts by `rate`. The larger the weights, the slower: prefer an accelerated solver to plain
    iteration. `ContractiveLinear` contracts faster and can express less.

    Args:
        features: size of the last dim of the state (*, features).
        margin: m, how strongly monotone I - W is; positive.
        bias: whether to learn b.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: a margin that is not a number.
        ValueError: a margin that is not positive and finite.
    """

    def __init__(
        self, features: int, margin: float = 1.0, *, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(margin, torch.zeros(features, device=device, dtype=dtype) if bias else None)
        self.symmetric = nn.Linear(features, features, bias=False, device=device, dtype=dtype)
        self.antisymmetric = nn.Linear(features, features, bias=False, device=device, dtype=dtype)
        for part in (self.symmetric, self.antisymmetric):
            nn.init.xavier_normal_(part.weight, gain=0.5)

    def _residual_operator(self, x: Tensor) -> Tensor:
        a, b = self.symmetric.weight, self.antisymmetric.weight
        return F.linear(F.linear(x, a), a.mT) - F.linear(x, b - b.mT)  # pyright: ignore

    def _norm_bound(self) -> Tensor:
        a, b = _precise(self.symmetric), _precise(self.antisymmetric)
        with without_autocast(a.device):
            eye = torch.eye(len(a), device=a.device, dtype=a.dtype)
            return matrix_norm_bound(self.margin * eye + a.mT @ a - b + b.mT)


class MonotoneConv2d(_Monotone):
    """A convolutional block with exactly one fixed point for any values of its weights: see `MonotoneLinear`.

    A and B are convolutions with zero padding, A^T and B^T their adjoints. The rate holds for images of any size.

    Args:
        channels: C of the state (N, C, H, W).
        kernel_size: odd; one number or one for height and width each.
        margin: m, how strongly monotone I - W is; positive.
        bias: whether to learn b.
        conv_bound: how to bound the norms of A and B, "fourier" or "reshaped": see `spectral_norm`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: a margin that is not a number.
        ValueError: an even kernel size, a margin that is not positive and finite, an unknown bound of the norm.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 3,
        margin: float = 1.0,
        *,
        bias: bool = True,
        conv_bound: Literal["fourier", "reshaped"] = "fourier",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(margin, torch.zeros(channels, device=device, dtype=dtype) if bias else None)
        self.padding = same_padding(kernel_size)
        parts = [
            nn.Conv2d(channels, channels, kernel_size, padding=self.padding, bias=False, device=device, dtype=dtype)
            for _ in range(2)
        ]
        self.convolution = Convolution.of(parts[0], conv_bound)
        for part in parts:
            nn.init.xavier_normal_(part.weight, gain=0.5)
        self.symmetric, self.antisymmetric = parts

    def _residual_operator(self, x: Tensor) -> Tensor:
        a, b = self.symmetric.weight, self.antisymmetric.weight
        both = self.symmetric(x), self.antisymmetric(x)
        adjoint = F.conv_transpose2d(both[0], a, padding=self.padding)  # pyright: ignore
        return adjoint - both[1] + F.conv_transpose2d(x, b, padding=self.padding)  # pyright: ignore

    def _norm_bound(self) -> Tensor:
        a, b = _precise(self.symmetric), _precise(self.antisymmetric)
        with without_autocast(a.device):
            return self.margin + self.convolution.norm_bound(a) ** 2 + 2 * self.convolution.norm_bound(b)

    def _shaped_bias(self, bias: Tensor) -> Tensor:
        return bias[:, None, None]


def _precise(part: nn.Module) -> Tensor:
    weight: Any = part.weight
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
