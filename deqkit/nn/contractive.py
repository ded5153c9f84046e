"""L6. Blocks that contract whatever their weights are: one fixed point, reached at a rate known beforehand.

f(x) = act(W x + b + inputs) with |W|_2 <= bound < 1 and |act'| <= 1 contracts by ``bound`` in the Euclidean norm:
|f(x) - f(y)| <= bound |x - y|. `spectral_norm` caps W, for a convolution by a bound of the operator itself. For blocks
with larger weights see `deqkit.nn.monotone`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from deqkit.nn.norm_caps import spectral_norm

#: Activations that nowhere grow faster than their argument. (GELU, SiLU and Mish do: by 1.13, 1.10 and 1.09.)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "hardtanh": F.hardtanh,
    "identity": lambda x: x,
    "leaky_relu": F.leaky_relu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}


class _Contractive(nn.Module):
    """act(W x + b + inputs), with W in a module of one layer."""

    def __init__(self, layer: nn.Module, bound: float, activation: str, **settings: Any) -> None:
        super().__init__()
        if isinstance(bound, bool) or not isinstance(bound, (int, float)):
            raise TypeError(f"{type(self).__name__}: bound must be a number, got {bound!r}")
        if not 0 < bound < 1:
            raise ValueError(f"{type(self).__name__}: bound must lie between 0 and 1, got {bound}")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{type(self).__name__}: unknown activation {activation!r}: choose one of {sorted(ACTIVATIONS)}, which "
                f"nowhere grow faster than their argument"
            )
        self.activation = activation
        self.layer = spectral_norm(layer, bound, **settings)

    @property
    def bound(self) -> float:
        """The factor by which the block contracts; infinite once the parametrisation of its weight was removed."""
        return self.layer.parametrizations["weight"][0].cap if is_parametrized(self.layer, "weight") else math.inf  # pyright: ignore

    def forward(self, x: Tensor, inputs: Tensor | float = 0.0) -> Tensor:
        """One evaluation of f.

        Args:
            x: the state, see the class.
            inputs: what is added before the activation; broadcast to the shape of x.

        Returns:
            f(x), of the shape of x.
        """
        return ACTIVATIONS[self.activation](self.layer(x) + inputs)

    def extra_repr(self) -> str:
        """Settings shown by print()."""
        return f"bound={self.bound}, activation={self.activation!r}"


class ContractiveLinear(_Contractive):
    """A fully connected block f(x, inputs) = act(W x + b + inputs) that contracts by ``bound`` or more.

    Made to be solved for: ``deqkit.nn.FixedPoint(ContractiveLinear(64))``. Plain iteration from any x0 has an error of
    at most ``bound**k`` times that of x0 after k steps. In half precision that holds up to rounding.

    Args:
        features: size of the last dim of the state (*, features).
        bound: Lipschitz constant of f in x, in (0, 1).
        bias: whether to learn b.
        activation: a name; one of those whose slope nowhere exceeds 1.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: a bound that is not a number.
        ValueError: a bound out of range or an unknown activation.
    """

    def __init__(
        self,
        features: int,
        bound: float = 0.9,
        *,
        bias: bool = True,
        activation: str = "relu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(nn.Linear(features, features, bias, device=device, dtype=dtype), bound, activation)


class ContractiveConv2d(_Contractive):
    """A convolutional block f(x, inputs) = act(W * x + b + inputs) that contracts by ``bound`` or more.

    The bound holds for the convolution as an operator on images of any size. See `ContractiveLinear` for what follows.

    Args:
        channels: C of the state (N, C, H, W).
        kernel_size: odd; one number or one for height and width each.
        bound: Lipschitz constant of f in x, in (0, 1).
        bias: whether to learn b.
        groups: number of groups of channels.
        padding_mode: "zeros" or "circular".
        activation: a name; one of those whose slope nowhere exceeds 1.
        conv_bound: how to bound the norm, "fourier" or "reshaped": see `spectral_norm`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: a bound that is not a number.
        ValueError: an even kernel size, a bound out of range, an unknown activation, padding or bound of the norm.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 3,
        bound: float = 0.9,
        *,
        bias: bool = True,
        groups: int = 1,
        padding_mode: Literal["zeros", "circular"] = "zeros",
        activation: str = "relu",
        conv_bound: Literal["fourier", "reshaped"] = "fourier",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        layer = nn.Conv2d(
            channels, channels, kernel_size, padding=same_padding(kernel_size), bias=bias, groups=groups,
            padding_mode=padding_mode, device=device, dtype=dtype,
        )  # fmt: skip
        super().__init__(layer, bound, activation, conv_bound=conv_bound)


def same_padding(kernel_size: int | tuple[int, int]) -> tuple[int, int]:
    """The padding that keeps the size of an image.

    Raises:
        ValueError: an even kernel size.
    """
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    if height % 2 == 0 or width % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that f keeps the shape of the state, got {kernel_size}")
    return height // 2, width // 2
