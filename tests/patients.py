"""Maps with something to find, for the tests of `deqkit.diagnose`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import deqkit

Patient = tuple[Callable[..., Any], Tensor, tuple[Any, ...]]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Cell(nn.Module):
    """tanh(between(W x) + b)."""

    def __init__(self, weight: Tensor, between: nn.Module | None = None) -> None:
        super().__init__()
        n = len(weight)
        self.linear = nn.Linear(n, n)
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.linear.bias.zero_()
        self.between = between or nn.Identity()

    def forward(self, x: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(self.between(self.linear(x)) + b)


def contraction(gain: float = 0.7, n: int = 12) -> Tensor:
    return gain * torch.linalg.qr(draw(n, n, seed=0)).Q


def patient(weight: Tensor, between: nn.Module | None = None, batch: int = 4) -> Patient:
    n = len(weight)
    return Cell(weight, between), torch.zeros(batch, n), (0.5 * draw(batch, n, seed=1),)


def healthy() -> Patient:
    return patient(contraction())


def expanding() -> Patient:
    """Spectral radius above 1 at a fixed point that Anderson and Broyden find."""
    weight = draw(16, 16, seed=1)
    return patient(-1.9 * weight / torch.linalg.eigvals(weight).abs().max())


def stochastic() -> Patient:
    return patient(contraction(), nn.Dropout(0.2))


def coupled() -> Patient:
    return patient(contraction(), nn.BatchNorm1d(12))


def verdicts(d: deqkit.Diagnosis) -> dict[str, str]:
    return {check.name: check.verdict for check in d.checks}


def failures(d: deqkit.Diagnosis) -> list[str]:
    return [check.name for check in d.failed]


def advice(d: deqkit.Diagnosis) -> str:
    return "\n".join(d.recommendations)


def few(f: Any, x0: Any, **settings: Any) -> deqkit.Diagnosis:
    """A diagnosis of the checks and little else."""
    return deqkit.diagnose(f, x0, **{"solvers": ["anderson"], "adjoints": ["jfb"], "max_steps": 30} | settings)
