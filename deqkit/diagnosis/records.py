"""L6. What a diagnosis is made of. Tensors lie on the CPU and hold no graph; "batch" is the batch shape of x0."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from deqkit.adjoints import Adjoint
from deqkit.solution import Status
from deqkit.solvers import Solver

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Verdict = Literal["passed", "failed", "noted", "skipped"]


@dataclass(frozen=True)
class Check:
    """One property of f, looked at.

    Attributes:
        name: which property.
        verdict: "passed", "failed", "skipped", or "noted" for what is neither good nor bad.
        finding: what was found, one sentence.
        evidence: the numbers and names behind it.
    """

    name: str
    verdict: Verdict
    finding: str
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The Jacobian df/dx at the fixed point.

    Attributes:
        radius: spectral radius per sample, batch; None where it is not known.
        radius_error: about how far that is off, batch; large where J is far from normal.
        norm: spectral norm per sample, batch; None likewise.
        eigenvalues: of the sample with the largest radius, complex, by falling modulus; None without scipy.
        worst: that sample, as an index into the flattened batch.
        settled: which samples lie at a fixed point, bool, batch; the others at the best point that was found.
        one_system: the batch was taken as a single system, since f couples its samples; batch is () then.
        note: what is missing, and why.
    """

    radius: Tensor | None = None
    radius_error: Tensor | None = None
    norm: Tensor | None = None
    eigenvalues: Tensor | None = None
    worst: int = 0
    settled: Tensor | None = None
    one_system: bool = False
    note: str = ""

    def of_interest(self, values: Tensor | None) -> Tensor | None:
        """Those of the samples at a fixed point, if any is, flat; of all samples, if none; finite ones only."""
        if values is None:
            return None
        flat = values.reshape(-1)
        if self.settled is not None and bool(self.settled.any()):
            flat = flat[self.settled.reshape(-1)]
        flat = flat[torch.isfinite(flat)]
        return flat if flat.numel() else None


@dataclass(frozen=True, eq=False)
class SolverTrial:
    """One solver, tried on f from x0.

    Attributes:
        name: of the solver, with the settings that are not its defaults.
        solver: its settings.
        status: `Status` codes, batch; None where the solve raised an error, as for the others.
        num_steps: per sample, batch.
        relative_residual: of the point returned, batch.
        error: distance of that point to the fixed point that was found in the end, relative to it, batch.
        trace: relative residual of every evaluation, (evaluations, batch).
        num_fn_evals: calls of f.
        seconds: of the solve, without gradient, measured once.
        exception: what it raised, if anything.
    """

    name: str
    solver: Solver
    status: Tensor | None = None
    num_steps: Tensor | None = None
    relative_residual: Tensor | None = None
    error: Tensor | None = None
    trace: Tensor | None = None
    num_fn_evals: int = 0
    seconds: float = 0.0
    exception: str = ""

    @property
    def converged(self) -> Tensor:
        """Which samples converged, bool, batch; (0,) where the solve raised an error."""
        return torch.zeros(0, dtype=torch.bool) if self.status is None else self.status == Status.CONVERGED

    @property
    def num_converged(self) -> int:
        """How many samples converged."""
        return int(self.converged.sum())

    @property
    def left(self) -> tuple[float, float]:
        """The worst relative residual and the median one, infinite where not a number."""
        if self.relative_residual is None or not self.relative_residual.numel():
            return math.inf, math.inf
        residuals = self.relative_residual.double().nan_to_num(nan=math.inf)
        return float(residuals.max()), float(residuals.median())

    @property
    def all_converged(self) -> bool:
        """Whether the solve came to its end, and every sample converged."""
        return self.status is not None and bool(self.converged.all())


@dataclass(frozen=True)
class AdjointTrial:
    """One adjoint, judged by its gradient at the fixed point for a random cotangent.

    Attributes:
        name: of the adjoint, with the settings that are not its defaults.
        adjoint: its settings.
        cosine: of the angle to the exact gradient; None where there is no gradient, as for the next.
        relative_error: |gradient - exact| / |exact|.
        num_products: vector-Jacobian products of the adjoint solve; None where there is none.
        seconds: what the gradient adds to a solve, measured once.
        through: the solver whose solve was differentiated; "" where the gradient was taken at the fixed point.
        exception: why there is no gradient.
    """

    name: str
    adjoint: Adjoint
    cosine: float | None = None
    relative_error: float | None = None
    num_products: int | None = None
    seconds: float = 0.0
    through: str = ""
    exception: str = ""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `deqkit.diagnose` found. ``print()`` it, or look at `plot`.

    Attributes:
        subject: name of f.
        state: the state in words.
        num_samples: samples in x0.
        rtol: tolerance of the solves.
        resolution: relative precision of a value of f.
        max_steps: their step limit.
        checks: properties of f: `Check` objects with ``name``, ``verdict``, ``finding`` and ``evidence``.
        spectrum: the Jacobian at the fixed point; None where it was not taken.
        solvers: one entry per solver that was tried.
        variations: solves without what ails f (with the same random numbers at every call, in eval mode, as one
            system), to see whether that is the cause; empty for a healthy f.
        adjoints: one entry per adjoint that was tried.
        notes: what was left out, and why.
        recommendations: what to do, in words; the most urgent first.
        num_fn_evals: how often f was called for all of this.
        num_products: how often it was differentiated.
        seconds: how long it took.
    """

    subject: str
    state: str
    num_samples: int
    rtol: float
    max_steps: int
    resolution: float = 0.0
    checks: tuple[Check, ...] = ()
    spectrum: Spectrum | None = None
    solvers: tuple[SolverTrial, ...] = ()
    variations: tuple[SolverTrial, ...] = ()
    adjoints: tuple[AdjointTrial, ...] = ()
    notes: tuple[str, ...] = ()
    recommendations: tuple[str, ...] = ()
    num_fn_evals: int = 0
    num_products: int = 0
    seconds: float = 0.0

    @property
    def healthy(self) -> bool:
        """No check failed, and some solver converged on every sample."""
        return not self.failed and any(trial.all_converged for trial in self.solvers)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.verdict == "failed")

    @property
    def best(self) -> SolverTrial | None:
        """The solver that converged on the most samples, first of `ranked`; None if none did on any."""
        return ranked(self.solvers)[0] if any(trial.num_converged for trial in self.solvers) else None

    def check(self, name: str) -> Check:
        """The check of that name.

        Raises:
            KeyError: there is none.
        """
        found = {check.name: check for check in self.checks}
        if name not in found:
            raise KeyError(f"no check {name!r}: there are {list(found)}")
        return found[name]

    def plot(self) -> Figure:
        """One figure: residuals, eigenvalues, gradient errors, steps per sample. ``.savefig(path)`` writes it.

        Raises:
            ImportError: matplotlib is absent.
        """
        from deqkit.diagnosis.figure import draw

        return draw(self)

    def __str__(self) -> str:
        from deqkit.diagnosis.report import write

        return write(self)

    __repr__ = __str__


def ranked(trials: tuple[SolverTrial, ...] | list[SolverTrial]) -> list[SolverTrial]:
    """The trials, best first: most samples converged; if not all, smallest residual left; then fewest calls of f."""

    def key(t: SolverTrial) -> tuple[Any, ...]:
        return t.status is None, -t.num_converged, (0.0, 0.0) if t.all_converged else t.left, t.num_fn_evals

    return sorted(trials, key=key)


def full_name(setting: Solver | Adjoint) -> str:
    """The name of a solver or an adjoint; with settings that are not its defaults, the words that make it."""
    try:
        default: Any = type(setting)()
    except TypeError:
        return repr(setting)
    changed = [f"{k}={v!r}" for k, v in vars(setting).items() if v != getattr(default, k)]
    return f"{type(setting).__name__}({', '.join(changed)})" if changed else setting.name
