"""L2. The solvers, and the names they go by. A new one is one file and one line here."""

from deqkit.solvers.anderson import Anderson
from deqkit.solvers.auto import Auto
from deqkit.solvers.base import Point, Solver, SolverState
from deqkit.solvers.bicgstab import BiCGSTAB
from deqkit.solvers.broyden import Broyden
from deqkit.solvers.fixed_point import FixedPointIteration
from deqkit.solvers.mixed_precision import MixedPrecision
from deqkit.solvers.newton_krylov import GMRES, NewtonKrylov
from deqkit.solvers.reversible import ReversibleIteration

SOLVERS: dict[str, type[Solver]] = {
    cls.name: cls
    for cls in (
        FixedPointIteration,
        Anderson,
        Broyden,
        NewtonKrylov,
        GMRES,
        BiCGSTAB,
        ReversibleIteration,
        Auto,
        MixedPrecision,
    )
}

# One object serves any number of solves. Dynamo can take one from here, but cannot make an Auto.
_DEFAULTS: dict[str, Solver] = {name: cls() for name, cls in SOLVERS.items()}


def make_solver(solver: str | Solver) -> Solver:
    """The solver that a user's setting stands for.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a solver object.
    """
    if isinstance(solver, Solver):
        return solver
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}: choose one of {sorted(SOLVERS)} or pass a solver object")
        return _DEFAULTS[solver]
    hint = f"; call it: {solver.__name__}()" if isinstance(solver, type) else ""
    raise TypeError(f"solver must be a name or a solver object, got {solver!r}{hint}")


def make_backward_solver(solver: str | Solver) -> Solver:
    """The solver of a linear equation of vector-Jacobian products that a user's setting stands for.

    Raises:
        ValueError: an unknown name, or a solver in mixed precision.
        TypeError: neither a name nor a solver object.
    """
    made = make_solver(solver)
    if any(stage.autocast is not None for stage in made.stages()):
        raise ValueError(
            f"solver={made.name!r} is none for a backward pass: vector-Jacobian products run in the precision of the "
            f"graph that they go along. Give its own solver instead, such as {made.stages()[-1].solver.name!r}"
        )
    return made


__all__ = [
    "GMRES",
    "SOLVERS",
    "Anderson",
    "Auto",
    "BiCGSTAB",
    "Broyden",
    "FixedPointIteration",
    "MixedPrecision",
    "NewtonKrylov",
    "Point",
    "ReversibleIteration",
    "Solver",
    "SolverState",
    "make_backward_solver",
    "make_solver",
]
