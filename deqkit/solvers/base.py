"""L2. What every solver is: frozen settings, and a separate state object with one method, `step`."""

from __future__ import annotations

import numbers
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from deqkit.state import Blocks


@dataclass(frozen=True)
class Point:
    """A point that the loop has evaluated.

    Attributes:
        x: the point, (B, d) per leaf.
        fx: f(x).
        r: the residual f(x) - x.
        residual: the norm of r, (B,), without gradient.
        distance: `Termination.distance` of the point, (B,), without gradient.
        steps_left: how many more points the solve may evaluate.
        resolution: relative precision of a value of f.
    """

    x: Blocks
    fx: Blocks
    r: Blocks
    residual: Tensor
    distance: Tensor
    steps_left: int
    resolution: float


class SolverState(Protocol):
    """What a solver remembers during one solve."""

    def step(self, point: Point) -> Blocks:
        """The next point to evaluate, as fresh tensors."""
        ...


@dataclass(frozen=True)
class Solver(ABC):
    """Settings of a solver; one object serves any number of solves, in any number of threads.

    Args:
        check_every: steps between two looks at the convergence flags from the host. Each look synchronises with the
            device once; between looks every sample still stops, freezes and is counted at its own step.
    """

    name: ClassVar[str]
    check_every: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        require_int(self, "check_every", minimum=1)

    @property
    def blind_steps(self) -> int:
        """The most steps in a row that may bring no better point although all goes well."""
        return 0

    def stages(self, max_steps: int) -> list[tuple[Solver, int]]:
        """The solvers that make up this one, in the order in which they are tried, with the step limit of each."""
        return [(self, max_steps)]

    @abstractmethod
    def start(self) -> SolverState:
        """A fresh state for one solve."""


class Safeguard:
    """Which stored pairs each sample may use: its neighbours may have restarted at other steps.

    Args:
        restart_factor: a sample drops its pairs when its distance exceeds this multiple of its best one.
        first: the distance of the first point, (B,).
    """

    def __init__(self, restart_factor: float, first: Tensor) -> None:
        self.restart_factor, self.best_distance = restart_factor, first
        self.usable = torch.zeros(first.shape[0], 0, dtype=torch.bool, device=first.device)

    def restart(self, distance: Tensor) -> None:
        """Take away all pairs of samples that are far above their best."""
        restart = distance > self.restart_factor * self.best_distance
        self.usable = self.usable & ~restart.unsqueeze(1)
        self.best_distance = torch.minimum(self.best_distance, distance)

    def admit(self, slot: int, good: Tensor) -> None:
        """Enter the pair that was written to ``slot``, usable where ``good`` (B,)."""
        if slot >= self.usable.shape[1]:
            self.usable = torch.cat([self.usable, good.unsqueeze(1)], dim=1)
        else:
            self.usable = self.usable.clone()
            self.usable[:, slot] = good


def as_int(name: str, value: Any) -> int:
    """An integer setting, which may be of any integer type.

    Raises:
        TypeError: not an integer.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return operator.index(value)


def require_int(owner: object, name: str, minimum: int) -> None:
    """Refuse a setting that is no integer of at least ``minimum``.

    Raises:
        TypeError: not an integer.
        ValueError: too small.
    """
    given = getattr(owner, name)
    value = as_int(f"{type(owner).__name__}: {name}", given)
    if value < minimum:
        raise ValueError(f"{type(owner).__name__}: {name} must be at least {minimum}, got {value}")
    if value is not given:
        object.__setattr__(owner, name, value)


def require_float(owner: object, name: str, low: float, high: float, *, ends: str = "[)") -> None:
    """Refuse a setting that is no number between ``low`` and ``high``.

    Args:
        owner: the settings.
        name: which of them.
        low: lower end.
        high: upper end.
        ends: whether each end is allowed: "[" or "]" where it is, "(" or ")" where not.

    Raises:
        TypeError: not a number.
        ValueError: out of range.
    """
    given = getattr(owner, name)
    if isinstance(given, bool) or not isinstance(given, int | float | numbers.Real):
        raise TypeError(f"{type(owner).__name__}: {name} must be a number, got {given!r}")
    value = float(given)
    inside = (low <= value if ends[0] == "[" else low < value) and (value <= high if ends[1] == "]" else value < high)
    if not inside:
        raise ValueError(
            f"{type(owner).__name__}: {name} must be in {ends[0]}{low:g}, {high:g}{ends[1]}, got {value:g}"
        )
    if type(given) not in (int, float):
        object.__setattr__(owner, name, value)
