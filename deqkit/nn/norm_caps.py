"""L6. Weight norm and spectral norm with a cap: parametrisations that keep a weight from growing too large.

Weight norm: w = g v / |v| for every slice of the weight (Salimans & Kingma, "Weight Normalization", NeurIPS 2016, arXiv
1602.07868), with g limited to [-cap, cap].

Spectral norm: w = v min(1, cap / |v|), with an upper bound of the spectral norm of the operator for |v| (Behrmann et
al., "Invertible Residual Networks", ICML 2019, arXiv 1811.00995, who take an estimate from below). A weight within its
cap is left as it is, where `torch.nn.utils.parametrizations.spectral_norm` divides by the norm always.

Both are functions of the parameters alone: nothing is iterated from call to call or differs between train() and eval().
Their derivatives are exact. So a weight beyond its cap has none in the direction that would shrink it, and gradient
steps alone do not lead it back. Assigning a weight to itself does: see `spectral_norm`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from deqkit.nn.operator_norm import CONVOLUTIONS, Convolution, matrix_norm_bound
from deqkit.nn.parametrization import register
from deqkit.state import without_autocast


def weight_norm(module: nn.Module, cap: float | None = None, *, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """Weight normalisation whose norms do not exceed a cap.

    The weight becomes w = g v / |v|, with |.| the Euclidean norm of each slice along ``dim`` and g its length, limited
    to [-cap, cap]. For a convolution and ``dim=0`` that is one length per output channel. It bounds the norm of the
    operator only through the number of slices: |w|_2 <= sqrt(slices) cap for a linear layer (and <= cap with
    ``dim=None``). Where a bound is needed, use `spectral_norm`.

    Parameters and their names in the state dict are those of `torch.nn.utils.parametrizations.weight_norm`, so
    checkpoints can be exchanged. Slices of zeros are fine: they get a direction, and a length of 0.

    The weight is computed once per solve, see `hold`. The module can be copied and pickled.

    Args:
        module: the module whose weight to parametrise, in place. It gets new parameters: make the optimiser afterwards.
        cap: the largest length; None for no limit. It can be changed later, as
            ``module.parametrizations.weight[0].cap``.
        name: name of the weight.
        dim: dimension of the slices; None for the norm of the whole weight.

    Returns:
        The module.

    Raises:
        TypeError: the weight is not a floating or complex tensor, or the cap not a number.
        ValueError: no such weight, one that is parametrised already or not initialised yet, a cap that is not positive
            and finite, or no such dimension.
    """
    weight = _weight_of(module, name)
    if parametrize.is_parametrized(module, name):
        raise ValueError(f"weight_norm: {name!r} is parametrised already, and weight_norm has to come first")
    if dim is not None and not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"weight_norm: dim must be None or within the {weight.dim()} dims of the weight, got {dim}")
    dim = dim if dim is None else dim % weight.dim()
    return register(module, name, WeightNorm(dim, None if cap is None else _as_cap(cap)))


def spectral_norm(
    module: nn.Module,
    cap: float = 1.0,
    *,
    name: str = "weight",
    conv_bound: Literal["fourier", "reshaped"] = "fourier",
) -> nn.Module:
    """Scale a weight down wherever the spectral norm of its operator exceeds a cap.

    The norm is bounded from above, so that it is the operator itself that stays within the cap: of a matrix to within
    1 percent, of a convolution as an operator on images of any size, with zero or circular padding, any stride,
    dilation and groups ("fourier": to within about 5 percent in two dimensions for images much larger than the kernel;
    "reshaped": up to the square root of the number of taps). In half precision the weight itself is rounded, and the
    cap holds to that precision.

    The bound takes about 10 products of square matrices of the smaller side of the weight, for a convolution under
    "fourier" as many for each of about 70 (k - 1)^2 / 2 frequencies; a solve computes it once. Above 64 channels or so
    "reshaped" is the one to start with on a CPU.

    A weight beyond its cap has no gradient in the direction that would shrink it. To let it come back where training
    wants it to, assign it to itself after each step of the optimiser: ``module.weight = module.weight`` moves the
    underlying parameter back to the cap.

    The weight is computed once per solve, see `hold`. The module can be copied and pickled. Once trained, the weight
    can be made an ordinary one again, with `torch.nn.utils.parametrize.remove_parametrizations(module, "weight")`.

    Args:
        module: the module whose weight to parametrise, in place: a convolution of PyTorch, or any other with a weight
            that it uses as a matrix.
        cap: the largest norm. It can be changed later, as ``module.parametrizations.weight[0].cap``.
        name: name of the weight.
        conv_bound: how to bound the norm of a convolution, "fourier" or "reshaped".

    Returns:
        The module.

    Raises:
        TypeError: the weight is not a floating or complex tensor, or the cap not a number.
        ValueError: no such weight or one that is not initialised yet, a cap that is not positive and finite, an unknown
            bound, a weight that is neither a matrix nor that of a convolution, or a convolution with another padding
            than zeros or circular.
    """
    weight = _weight_of(module, name)
    is_conv = isinstance(module, CONVOLUTIONS) and name == "weight"
    if not is_conv and weight.dim() != 2:
        raise ValueError(
            f"spectral_norm takes a matrix, or the weight of a convolution of torch.nn; {name!r} of "
            f"{type(module).__name__} has shape {tuple(weight.shape)}"
        )
    return register(module, name, SpectralNorm(_as_cap(cap), Convolution.of(module, conv_bound) if is_conv else None))


class WeightNorm(nn.Module):
    """The parametrisation behind `weight_norm`."""

    def __init__(self, dim: int | None, cap: float | None) -> None:
        super().__init__()
        self.dim, self.cap = dim, cap

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """The weight, of length g in the direction of v."""
        norm = _length(v, self.dim)
        if self.cap is not None:  # not by clamp, which has no derivative at the cap either
            g = torch.where(g.abs() > self.cap, g.detach().clamp(-self.cap, self.cap), g)
        return v * (g.to(norm.dtype) / norm.clamp(min=torch.finfo(norm.dtype).tiny)).to(v.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Length, at most the cap, and direction."""
        g = _length(weight, self.dim)
        v = torch.where(g == 0, torch.ones_like(weight), weight)
        return (g if self.cap is None else g.clamp(max=self.cap)).to(weight.real.dtype), v

    def extra_repr(self) -> str:
        """Settings shown by print()."""
        return f"cap={self.cap}, dim={self.dim}"


class SpectralNorm(nn.Module):
    """The parametrisation behind `spectral_norm`."""

    def __init__(self, cap: float, convolution: Convolution | None) -> None:
        super().__init__()
        self.cap, self.convolution = cap, convolution

    def norm_bound(self, weight: Tensor) -> Tensor:
        """An upper bound of the norm of the operator with this weight."""
        with without_autocast(weight.device):
            weight = _at_least_float32(weight)
            return matrix_norm_bound(weight) if self.convolution is None else self.convolution.norm_bound(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, scaled down to the cap."""
        return weight * (self.cap / self.norm_bound(weight).clamp(min=self.cap)).to(weight.real.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The same weight; one beyond the cap is moved to just below it, from where a gradient leads anywhere."""
        bound = self.norm_bound(weight)
        below = self.cap * (1 - 16 * torch.finfo(bound.dtype).eps)
        return weight * torch.where(bound > below, below / bound, 1.0).to(weight.real.dtype)

    def extra_repr(self) -> str:
        """Settings shown by print()."""
        return f"cap={self.cap}" + ("" if self.convolution is None else f", conv_bound={self.convolution.bound!r}")


def _length(v: Tensor, dim: int | None) -> Tensor:
    """The norm of every slice, with dims of size 1 in place of those summed over; () for that of the whole."""
    v = _at_least_float32(v)
    if dim is None:
        return torch.linalg.vector_norm(v)
    others = [d for d in range(v.dim()) if d != dim]
    return torch.linalg.vector_norm(v, dim=others, keepdim=True) if others else v.abs()


def _at_least_float32(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _weight_of(module: Any, name: str) -> Tensor:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    weight = getattr(module, name, None)
    if weight is None:
        raise ValueError(f"{type(module).__name__} has no parameter or buffer {name!r}")
    if not isinstance(weight, Tensor) or not (weight.is_floating_point() or weight.is_complex()):
        raise TypeError(f"{name!r} of {type(module).__name__} must be a floating or complex tensor")
    if is_lazy(weight):
        raise ValueError(f"{name!r} of {type(module).__name__} is not initialised yet: call the module once before")
    return weight


def _as_cap(cap: Any) -> float:
    if isinstance(cap, bool) or not isinstance(cap, (int, float)):
        raise TypeError(f"cap must be a number, got {cap!r}")
    if not (cap > 0 and math.isfinite(cap)):
        raise ValueError(f"cap must be positive and finite, got {cap}")
    return float(cap)
