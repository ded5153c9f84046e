"""L2. Mixed precision: a solver's early steps on f in low precision, the last ones on f itself.

While a residual is large, f is needed to a few digits only. So the solver first works on f under autocast, until its
residual is of the size of that precision's rounding, and then from there on f in the caller's precision:

    |f_low(x) - x| <= max(rtol, eps_low) |f_low(x)|,   then   |f(x) - x| <= rtol |f(x)|

As in iterative refinement (Higham & Mary, "Mixed precision algorithms in numerical linear algebra", Acta Numerica 31,
2022), the accuracy in the end is that of the precision in which the residual is computed. One unit of the low precision
is where to change over by the problems of benchmarks/problems.py, see `deqkit.termination.roughly`.

The second stage starts with an empty history: secant pairs of the first one are wrong by the rounding of f there, which
is as large as its last residuals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deqkit.solvers.anderson import Anderson
from deqkit.solvers.base import Solver, SolverState, Stage

_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MixedPrecision(Solver):
    """A solver that evaluates f in low precision first, under `torch.autocast`, and in full precision at the end.

    Every sample goes over to full precision when its residual has come down to the rounding of the low one, or to the
    tolerance, or when it can get no closer; from its best point, and for the rest of `max_steps`. Value, residual and
    status are those of f in full precision, which is evaluated at least once. It pays where a call of f in low
    precision takes much less time than one in full precision, as for convolutions and large products of matrices on
    hardware made for it, and where what is asked for is not much finer than the low precision. A start that is closer
    than that already, such as the last fixed point, is better left to ``solver`` alone.

    Only solves to a tolerance of float32 states outside of autocast have such a first stage. All others are those of
    ``solver`` alone: autocast leaves float64 and complex numbers as they are, lower precisions have nothing to gain,
    and a fixed number of steps has no point at which to go over.

    An f that itself solves, to a tolerance finer than the low precision, fails at that in the first stage.

    The trace and what a callback is told are residuals in the precision of their stage. The adjoint "unrolled"
    differentiates every step in the precision that it was taken in; "shine" and "reversible" need the record of a solve
    in one piece, and refuse. In a backward pass there is nothing to gain, as its products run in the precision of the
    graph.

    Args:
        solver: solver object, for both stages.
        dtype: low precision, torch.bfloat16 or torch.float16. Where f leaves the range of float16, full precision takes
            over.
        check_every: see `Solver`; ``solver`` has its own.

    Raises:
        TypeError: no solver object.
        ValueError: a solver that is itself in stages, or another dtype.
    """

    name: ClassVar[str] = "mixed_precision"
    solver: Solver = Anderson()
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.solver, Solver):
            raise TypeError(f"MixedPrecision: solver must be a solver object, got {self.solver!r}")
        if len(self.solver.stages()) > 1:
            raise ValueError(f"MixedPrecision: solver must be a single one, got {self.solver!r}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"MixedPrecision: dtype must be torch.bfloat16 or torch.float16, got {self.dtype!r}")

    def stages(self) -> tuple[Stage, ...]:
        """The solver in low precision, and as it is."""
        return Stage(self.solver, self.dtype), Stage(self.solver)

    def start(self) -> SolverState:
        """The state of the solver."""
        return self.solver.start()
