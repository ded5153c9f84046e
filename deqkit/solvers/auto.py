"""L2. One solver after another: a cheap one first, a thorough one for the samples on which it fell short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deqkit.solvers.anderson import Anderson
from deqkit.solvers.base import Solver, SolverState
from deqkit.solvers.broyden import Broyden


@dataclass(frozen=True)
class Auto(Solver):
    """Anderson acceleration for half of the steps, then Broyden's method for the samples that are not solved by then.

    Where f contracts, Anderson needs the fewest steps; where it expands, Broyden gets through more often.

    The second solver starts from the best point of the first and knows nothing of its history: each sample still fares
    as if it were alone. Samples on which the first solver diverges or stagnates wait for the others and are then taken
    up as well. A solve of a fixed number of steps has no failures to see and stays with the first.

    Args:
        first: the solver of all samples.
        then: the solver of those on which the first one fell short.
        check_every: see `Solver`; those of ``first`` and ``then`` apply.

    Raises:
        TypeError: no solver objects.
        ValueError: solvers that are themselves in stages.
    """

    name: ClassVar[str] = "auto"
    first: Solver = Anderson()
    then: Solver = Broyden()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("first", "then"):
            solver = getattr(self, name)
            if not isinstance(solver, Solver):
                raise TypeError(f"Auto: {name} must be a solver object, got {solver!r}")
            if isinstance(solver, Auto):
                raise ValueError(f"Auto: {name} must be a single solver, got {solver!r}")

    def stages(self, max_steps: int) -> list[tuple[Solver, int]]:
        """Each solver with its share of the steps."""
        return [(self.first, max_steps - max_steps // 2), (self.then, max_steps // 2)]

    def start(self) -> SolverState:
        """The state of the first solver."""
        return self.first.start()
