"""L2. What every solver is: frozen settings, and a separate state object with one method, `step`."""

from __future__ import annotations

import numbers
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from deqkit import arrays
from deqkit.arrays import Array
from deqkit.rows import Rows
from deqkit.state import Blocks


@dataclass(frozen=True)
class Measured:
    """How a point compares, per sample (B,), on the host or on the device.

    Attributes:
        residual: the norm of f(x) - x.
        distance: `Termination.distance` of the point.
        best_distance: the smallest so far, this one included.
        active: which samples were still being solved. The others rest at their best points.
    """

    residual: Array
    distance: Array
    best_distance: Array
    active: Array

    def select(self, rows: Rows) -> Measured:
        """Those of some samples."""
        return Measured(*(rows.of(a) for a in (self.residual, self.distance, self.best_distance, self.active)))


@dataclass(frozen=True)
class Point:
    """A point that the loop has evaluated.

    Attributes:
        x: the point, (B, d) per leaf.
        fx: f(x).
        r: the residual f(x) - x.
        measured: its sizes, without gradient.
        steps_left: how many more points the solve may evaluate.
        resolution: relative precision of a value of f.
    """

    x: Blocks
    fx: Blocks
    r: Blocks
    measured: Measured
    steps_left: int
    resolution: float

    @property
    def residual(self) -> Tensor:
        """The norm of r, (B,), on the device of x."""
        return arrays.as_tensor(self.measured.residual, self.x[0])

    @property
    def distance(self) -> Tensor:
        """`Termination.distance`, (B,), on the device of x."""
        return arrays.as_tensor(self.measured.distance, self.x[0])

    @property
    def active(self) -> Tensor:
        """Which samples were still being solved, (B,), on the device of x."""
        return arrays.as_tensor(self.measured.active, self.x[0])

    def select(self, rows: Rows) -> Point:
        """The point of some samples alone; measured sizes must be on the host."""
        x, fx, r = (rows.of_blocks(blocks) for blocks in (self.x, self.fx, self.r))
        return replace(self, x=x, fx=fx, r=r, measured=self.measured.select(rows))


class SolverState(Protocol):
    """What a solver remembers during one solve."""

    def step(self, point: Point) -> Blocks:
        """The next point to evaluate, as fresh tensors."""
        ...


@runtime_checkable
class SelectableState(SolverState, Protocol):
    """A state that can let go of samples."""

    def select(self, rows: Rows) -> None:
        """Go on with these samples alone."""
        ...


class RecordingState(SolverState, Protocol):
    """A state that has something to tell when the solve is over, to an adjoint that asks for it."""

    def conclude(self, point: Point) -> Any:
        """The record, of the type `Solver.record`; ``point`` is the last one, of which `step` has not been told."""
        ...


@dataclass(frozen=True)
class Solver(ABC):
    """Settings of a solver; one object serves any number of solves, in any number of threads.

    Args:
        check_every: steps between two looks at the convergence flags from the host. Each look synchronises with the
            device once; between looks every sample still stops, freezes and is counted at its own step.
    """

    name: ClassVar[str]
    #: Whether it solves x = f(x) for an f that is affine in x, and for no other.
    for_affine: ClassVar[bool] = False
    #: What the solver can hand over to an adjoint, see `start_recording`; None: nothing.
    record: ClassVar[type | None] = None
    #: Whether a step out of the domain of f may be taken back and replaced by another, see `deqkit.loop`.
    may_retreat: ClassVar[bool] = True
    check_every: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        require_int(self, "check_every", minimum=1)

    @property
    def blind_steps(self) -> int:
        """The most steps in a row that may bring no better point although all goes well."""
        return 0

    def stages(self) -> tuple[Stage, ...]:
        """The solves in a row that make up one by this solver."""
        return (Stage(self),)

    @abstractmethod
    def start(self) -> SolverState:
        """A fresh state for one solve."""

    def start_recording(self) -> RecordingState:
        """A fresh state for one solve, from which an adjoint will want the record."""
        raise NotImplementedError(f"solver={self.name!r} keeps no record")


class Stage(NamedTuple):
    """One of several solves in a row, see `deqkit.stages`.

    Attributes:
        solver: its solver, itself not in stages.
        autocast: low precision in which a first stage evaluates f, to come near the answer and no further; None: that
            of the caller.
    """

    solver: Solver
    autocast: torch.dtype | None = None


class Safeguard:
    """Which stored pairs each sample may use: its neighbours may have restarted at other steps.

    Args:
        restart_factor: a sample drops its pairs when its distance exceeds this multiple of its best one.
        all_samples: true for each sample, bool (B,), on the host or on the device, where the books are to be kept.

    Attributes:
        usable: bool (B, n), of the n pairs stored so far; None while all are known to be.
    """

    def __init__(self, restart_factor: float, all_samples: Array) -> None:
        self.restart_factor, self.all_samples = restart_factor, all_samples
        self.num_pairs = 0
        self.usable: Array | None = None

    def restart(self, point: Point) -> None:
        """Take away all pairs of samples that are far above their best."""
        far = point.measured.distance > self.restart_factor * point.measured.best_distance
        if not arrays.known_none(far):
            self.usable = self._written_out() & ~arrays.placed(far, self.all_samples)[:, None]

    def admit(self, slot: int, good: Array | None) -> None:
        """Enter the pair that was written to ``slot``, usable for the samples ``good`` (B,); None for all."""
        if self.usable is not None or good is not None:
            usable = self._written_out()
            good = self.all_samples if good is None else arrays.placed(good, self.all_samples)
            if slot == self.num_pairs:
                self.usable = arrays.with_column(usable, good)
            else:
                self.usable = usable = arrays.copy(usable)
                usable[:, slot] = good
        self.num_pairs = max(self.num_pairs, slot + 1)

    def select(self, rows: Rows) -> None:
        """Keep the books of these samples alone."""
        self.all_samples = rows.of(self.all_samples)
        self.usable = None if self.usable is None else rows.of(self.usable)

    def expel(self, slot: int, bad: Array) -> None:
        """Take the pair in ``slot`` away from the samples in ``bad`` (B,)."""
        self.usable = usable = arrays.copy(self._written_out())
        usable[:, slot] &= ~bad

    def _written_out(self) -> Array:
        if self.usable is not None:
            return self.usable
        # len() would fix the batch size of an exported program
        return arrays.zeros(self.all_samples, self.all_samples.shape[0], self.num_pairs) | self.all_samples[:, None]


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
