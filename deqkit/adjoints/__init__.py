"""L4. The adjoints, and the names they go by. A new one is one file and one line here."""

from deqkit.adjoints.base import Adjoint, Problem
from deqkit.adjoints.implicit import ImplicitAdjoint
from deqkit.adjoints.neumann import JFB, NeumannAdjoint
from deqkit.adjoints.phantom import PhantomAdjoint
from deqkit.adjoints.unrolled import UnrolledAdjoint

ADJOINTS: dict[str, type[Adjoint]] = {
    cls.name: cls for cls in (ImplicitAdjoint, NeumannAdjoint, JFB, PhantomAdjoint, UnrolledAdjoint)
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


__all__ = [
    "ADJOINTS",
    "JFB",
    "Adjoint",
    "ImplicitAdjoint",
    "NeumannAdjoint",
    "PhantomAdjoint",
    "Problem",
    "UnrolledAdjoint",
    "make_adjoint",
]
