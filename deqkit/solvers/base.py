"""L2. What every solver is: frozen settings, and a separate state object with one method, `step`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

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
    """

    x: Blocks
    fx: Blocks
    r: Blocks
    residual: Tensor
    distance: Tensor


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

    @abstractmethod
    def start(self) -> SolverState:
        """A fresh state for one solve."""


def require_int(owner: object, name: str, minimum: int) -> None:
    """Refuse a setting that is no integer of at least ``minimum``.

    Raises:
        TypeError: not an integer.
        ValueError: too small.
    """
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{type(owner).__name__}: {name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{type(owner).__name__}: {name} must be at least {minimum}, got {value}")


def require_float(owner: object, name: str, low: float, high: float) -> None:
    """Refuse a setting that is no number in [low, high).

    Raises:
        TypeError: not a number.
        ValueError: out of range.
    """
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{type(owner).__name__}: {name} must be a number, got {value!r}")
    if not low <= value < high:
        raise ValueError(f"{type(owner).__name__}: {name} must be in [{low:g}, {high:g}), got {value}")
