"""L4. The adjoints, and the names they go by. A new one is one file and one line here."""

from deqkit.adjoints.base import Adjoint, Problem
from deqkit.adjoints.every_level import solve_at_every_level
from deqkit.adjoints.implicit import ImplicitAdjoint
from deqkit.adjoints.neumann import JFB, NeumannAdjoint
from deqkit.adjoints.phantom import PhantomAdjoint
from deqkit.adjoints.reversible import ReversibleAdjoint
from deqkit.adjoints.shine import ShineAdjoint
from deqkit.adjoints.unrolled import UnrolledAdjoint
from deqkit.solvers import SOLVERS, Solver

ADJOINTS: dict[str, type[Adjoint]] = {
    cls.name: cls
    for cls in (ImplicitAdjoint, NeumannAdjoint, JFB, PhantomAdjoint, ShineAdjoint, UnrolledAdjoint, ReversibleAdjoint)
}


def make_adjoint(adjoint: str | Adjoint) -> Adjoint:
    """The adjoint that a user's setting stands for.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor an adjoint object.
    """
    if isinstance(adjoint, Adjoint):
        return adjoint
    if isinstance(adjoint, str):
        if adjoint not in ADJOINTS:
            raise ValueError(f"unknown adjoint {adjoint!r}: choose one of {sorted(ADJOINTS)} or pass an adjoint object")
        return ADJOINTS[adjoint]()
    hint = f"; call it: {adjoint.__name__}()" if isinstance(adjoint, type) else ""
    raise TypeError(f"adjoint must be a name or an adjoint object, got {adjoint!r}{hint}")


def check_record(adjoint: Adjoint, solver: Solver) -> None:
    """Refuse an adjoint that builds on what the solver does not record.

    Raises:
        ValueError: with the solvers that would do.
    """
    if adjoint.needs is not None and solver.record is not adjoint.needs:
        able = sorted(name for name, cls in SOLVERS.items() if cls.record is adjoint.needs)
        raise ValueError(
            f"adjoint={adjoint.name!r} builds on what solver={solver.name!r} does not record: choose one of the "
            f"solvers {able}, or another adjoint"
        )


__all__ = [
    "ADJOINTS",
    "JFB",
    "Adjoint",
    "ImplicitAdjoint",
    "NeumannAdjoint",
    "PhantomAdjoint",
    "Problem",
    "ReversibleAdjoint",
    "ShineAdjoint",
    "UnrolledAdjoint",
    "check_record",
    "make_adjoint",
    "solve_at_every_level",
]
