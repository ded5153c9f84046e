"""Fixed-point problems with known answers, shared by the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Equation:
    """x* = f(x*, *args) with x* known to about the precision of float64."""

    f: Callable[..., Tensor]
    args: tuple[Tensor, ...]
    solution: Tensor
    start: float = 0.0

    @property
    def x0(self) -> Tensor:
        return torch.full_like(self.solution, self.start)


def matrix(n: int, radius: float, seed: int, *, symmetric: bool = False) -> Tensor:
    """An n by n float64 matrix of the given spectral radius."""
    a = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    a = (a + a.T) / 2 if symmetric else a
    return a * radius / torch.linalg.eigvals(a).abs().max()


def affine(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x @ a.T + b


def tanh_layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(affine(x, a, b))


def linear(n: int = 20, batch: int = 4, radius: float = 0.8, seed: int = 0, *, symmetric: bool = False) -> Equation:
    """x = A x + b, solved directly."""
    a = matrix(n, radius, seed, symmetric=symmetric)
    b = torch.randn(batch, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    return Equation(affine, (a, b), torch.linalg.solve(torch.eye(n, dtype=torch.float64) - a, b.T).T)


def tanh(n: int = 20, batch: int = 4, radius: float = 0.8, seed: int = 0) -> Equation:
    """x = tanh(A x + b), built backwards: x* is drawn and b follows from it."""
    a = matrix(n, radius, seed)
    solution = 1.6 * torch.rand(batch, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)) - 0.8
    return Equation(tanh_layer, (a, torch.atanh(solution) - solution @ a.T), solution)


def cosine(batch: int = 3) -> Equation:
    """x = cos(c x), each sample with its own c; x* for c = 1 is Dottie's number."""
    c = torch.linspace(0.5, 1.0, batch, dtype=torch.float64).unsqueeze(1)
    x = torch.full_like(c, 0.7)
    for _ in range(60):  # Newton
        x = x - (x - torch.cos(c * x)) / (1 + c * torch.sin(c * x))
    return Equation(lambda x, c: torch.cos(c * x), (c,), x)


def square_root(batch: int = 4) -> Equation:
    """Heron's map for the square root: its Jacobian at x* is zero."""
    a = torch.arange(1, batch + 1, dtype=torch.float64).unsqueeze(1)
    return Equation(lambda x, a: (x + a / x) / 2, (a,), a.sqrt(), start=1.5)


EQUATIONS: dict[str, Callable[[], Equation]] = {
    "linear": linear,
    "linear_symmetric": lambda: linear(symmetric=True, radius=0.9),
    "linear_complex_pairs": lambda: Equation(
        affine,
        (torch.tensor([[0.0, -0.9], [0.9, 0.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)),
        torch.linalg.solve(
            torch.tensor([[1.0, 0.9], [-0.9, 1.0]], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        ).unsqueeze(0),
    ),
    "tanh": tanh,
    "cosine": cosine,
    "square_root": square_root,
}
