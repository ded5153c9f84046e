"""L2. One solver after another: a cheap one first, thorough ones for the samples on which it fell short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deqkit.solvers.anderson import Anderson
from deqkit.solvers.base import Solver, SolverState, Stage
from deqkit.solvers.broyden import Broyden
from deqkit.solvers.newton_krylov import NewtonKrylov


@dataclass(frozen=True)
class Auto(Solver):
    """Anderson acceleration, then Broyden's method, then Newton-Krylov, for the samples that are not solved by then.

    Where f contracts, Anderson needs the fewest steps; where it expands, Broyden gets through more often; close to a
    singular Jacobian Newton-Krylov does. A sample is handed on when a solver diverges or stagnates on it, and by all
    but the last also when at its present pace it would not get there in six times the steps that are left. It has
    `max_steps` in all.

    A later solver starts from the best point of those before and knows nothing of their history: each sample still
    fares as if it were alone. A solve of a fixed number of steps has no failures to see and stays with the first.

    Args:
        solvers: solver objects, in the order in which they are tried.
        check_every: see `Solver`; each of the solvers has its own.

    Raises:
        TypeError: no solver objects.
        ValueError: no solver at all, or one that is itself in stages.
    """

    name: ClassVar[str] = "auto"
    solvers: tuple[Solver, ...] = (Anderson(), Broyden(), NewtonKrylov())

    def __post_init__(self) -> None:
        super().__post_init__()
        solvers = tuple(self.solvers) if isinstance(self.solvers, tuple | list) else (self.solvers,)
        if not solvers:
            raise ValueError("Auto: solvers must name at least one solver")
        for solver in solvers:
            if not isinstance(solver, Solver):
                raise TypeError(f"Auto: solvers must be solver objects, got {solver!r}")
            if len(solver.stages()) > 1:
                raise ValueError(f"Auto: each of the solvers must be a single one, got {solver!r}")
        object.__setattr__(self, "solvers", solvers)

    def stages(self) -> tuple[Stage, ...]:
        """The solvers."""
        return tuple(Stage(solver) for solver in self.solvers)

    def start(self) -> SolverState:
        """The state of the first solver."""
        return self.solvers[0].start()
