"""L6. How far an adjoint's gradient is from the exact one, so that a cheaper adjoint can be chosen by evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from deqkit import stages
from deqkit.adjoints import Adjoint, ImplicitAdjoint, check_record, make_adjoint
from deqkit.adjoints.base import Evaluation, Problem
from deqkit.norms import l2
from deqkit.solution import AdjointStats
from deqkit.solvers import Solver, make_solver
from deqkit.state import Evaluator, StateLayout
from deqkit.termination import Termination

_RTOL, _MAX_STEPS = 1e-4, 50  # of an adjoint that takes those of the forward solve: the defaults of `deqkit.solve`


@dataclass(frozen=True)
class GradientError:
    """One adjoint against the exact one, over all parameters together.

    Attributes:
        adjoint: name of the adjoint.
        cosine: of the angle between both gradients; above 0 the adjoint's gradient still leads downhill.
        relative_error: |gradient - exact| / |exact|.
        num_tensors: tensors that the gradients were taken towards.
        num_products: vector-Jacobian products that the adjoint solve took; None for an adjoint without one.
    """

    adjoint: str
    cosine: float
    relative_error: float
    num_tensors: int
    num_products: int | None

    def __str__(self) -> str:
        cost = "" if self.num_products is None else f", {self.num_products} vector-Jacobian products"
        return f"{self.adjoint}: cosine {self.cosine:.6f}, relative error {self.relative_error:.1e}{cost}"


def gradient_error(
    f: Callable[..., Any],
    x: Any,
    adjoint: str | Adjoint,
    *,
    args: tuple[Any, ...] = (),
    cotangent: Any = None,
    batch_dims: int = 1,
    max_steps: int = 1000,
    x0: Any = None,
    solver: str | Solver = "anderson",
) -> GradientError:
    """Compare the gradient of an adjoint with that of the implicit function theorem at a fixed point.

    Args:
        f: the map, ``f(x, *args)``.
        x: a fixed point of it, such as `Solution.value`; the better it is, the more the answer means.
        adjoint: the adjoint to judge, at its own tolerance, or at the defaults of `deqkit.solve` where it takes
            those.
        args: further arguments of f.
        cotangent: dL/dx at x, of x's structure; None draws it at random from the global generator.
        batch_dims: see `deqkit.solve`.
        max_steps: limit of the exact adjoint solve, which runs GMRES to the precision of x.
        x0: where the forward solve starts whose inverse Jacobian "shine" uses; None for zeros. It is run here, at the
            defaults of `deqkit.solve`, for "shine" alone.
        solver: of that solve.

    Returns:
        A `GradientError`.

    Raises:
        ValueError: nothing that f depends on requires a gradient, the exact gradient is zero, the cotangent or x0 does
            not fit, the solver is none for the adjoint, or the adjoint is "unrolled" or "reversible", whose gradients
            belong to the way to x and not to x.
        ConvergenceError: the exact adjoint solve does not converge: there is nothing to compare with.
    """
    adjoint = make_adjoint(adjoint)
    if adjoint.unrolls:
        raise ValueError(
            f"adjoint={adjoint.name!r} differentiates the steps towards x, which are not known here; compare gradients "
            f"of deqkit.solve itself"
        )
    solver = make_solver(solver)
    check_record(adjoint, solver)
    exact = ExactGradient(f, x, args=args, cotangent=cotangent, batch_dims=batch_dims, max_steps=max_steps)
    return exact.compare(adjoint, record=None if adjoint.needs is None else exact.record_of(solver, x0))


class ExactGradient:
    """The gradient of the implicit function theorem at a fixed point, with which any number of others are compared.

    Args:
        f: see `gradient_error`, as are the others.
        x: see there.
        args: see there.
        cotangent: see there.
        batch_dims: see there.
        max_steps: see there.

    Raises:
        ValueError: see there.
        ConvergenceError: see there.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        x: Any,
        *,
        args: tuple[Any, ...] = (),
        cotangent: Any = None,
        batch_dims: int = 1,
        max_steps: int = 1000,
    ) -> None:
        self._f, self._args, self._x = f, args, tree_map(lambda leaf: leaf.detach(), x)
        self._layout = StateLayout(self._x, batch_dims)
        with torch.enable_grad():
            self.tensors = Evaluation.of(self._evaluator(), self._layout.pack(self._x)).dependencies.tensors
        if not self.tensors:
            raise ValueError("f depends on no leaf tensor or tensor in args that requires a gradient")
        if cotangent is None:
            cotangent = tree_map(torch.randn_like, self._x)
        self.cotangent = self._leaves_of("cotangent", cotangent)
        exact = ImplicitAdjoint("gmres", rtol=10 * self._layout.resolution, max_steps=max_steps)
        self._exact, _ = self._gradient(exact, on_failure="raise")
        if not bool(torch.isfinite(self._exact).all()):
            raise ValueError(
                "the exact gradient is not finite: f, or its derivative towards what it depends on, is not"
            )
        if self._exact.norm() == 0:
            raise ValueError("the exact gradient is zero: there is no direction to compare with")

    def record_of(self, solver: Solver, x0: Any) -> Any:
        """What ``solver`` records of a solve from ``x0``, None for zeros, at the defaults of `deqkit.solve`.

        Raises:
            ValueError: x0 does not look like x.
        """
        x0 = tree_map(torch.zeros_like, self._x) if x0 is None else x0
        self._leaves_of("x0", x0)
        settings: dict[str, Any] = {"max_steps": _MAX_STEPS, "norm": l2, "record": True}
        with torch.no_grad():
            return stages.run(self._evaluator(), self._layout.pack(x0), solver, Termination(_RTOL), **settings).record

    def compare(
        self, adjoint: Adjoint, *, rtol: float = _RTOL, max_steps: int = _MAX_STEPS, record: Any = None
    ) -> GradientError:
        """The gradient that an adjoint gives at the fixed point, after a solve with ``rtol`` and ``max_steps``.

        ``record`` is the one that the adjoint needs.
        """
        gradient, num_products = self._gradient(adjoint, rtol=rtol, max_steps=max_steps, record=record)
        return self._measure(adjoint.name, gradient, num_products)

    def compare_value(self, adjoint: Adjoint, value: Any, num_products: Callable[[], int | None]) -> GradientError:
        """The gradient that the ``value`` of a solve carries; ``num_products`` is called once it has been taken."""
        return self._measure(adjoint.name, self._gradient_of(tree_leaves(value)), num_products())

    def _evaluator(self) -> Evaluator:
        return Evaluator(self._f, self._layout, self._args)

    def _leaves_of(self, name: str, tree: Any) -> list[Tensor]:
        leaves, spec = tree_flatten(tree)
        shapes = [leaf.shape for leaf in tree_leaves(self._x)]
        if spec != self._layout.treespec or [leaf.shape for leaf in leaves] != shapes:
            raise ValueError(f"{name} must have the structure and the shapes of x")
        return leaves

    def _gradient(
        self, adjoint: Adjoint, *, rtol: float = _RTOL, max_steps: int = _MAX_STEPS, on_failure: str = "ignore",
        record: Any = None,
    ) -> tuple[Tensor, int | None]:  # fmt: skip
        """The gradient towards all tensors, and the products that its adjoint solve took."""
        problem = Problem(self._evaluator(), l2, rtol, 0.0, max_steps, on_failure, AdjointStats(), record)
        with torch.enable_grad():
            value = tree_leaves(self._layout.unpack(adjoint.attach(problem, self._layout.pack(self._x))))
        gradient = self._gradient_of(value)
        return gradient, problem.stats.num_fn_evals if problem.stats.status is not None else None

    def _gradient_of(self, value: list[Tensor]) -> Tensor:
        """The gradient towards all tensors as one float64 vector."""
        # The graph may lead through one of the caller's, who is to have it still.
        found = torch.autograd.grad(value, self.tensors, self.cotangent, allow_unused=True, retain_graph=True)
        parts = [torch.zeros_like(t) if g is None else g for g, t in zip(found, self.tensors, strict=True)]
        flat = [torch.view_as_real(g) if g.is_complex() else g for g in parts]
        return torch.cat([g.reshape(-1).double() for g in flat])

    def _measure(self, name: str, gradient: Tensor, num_products: int | None) -> GradientError:
        size = self._exact.norm()
        cosine = torch.dot(gradient, self._exact) / (size * gradient.norm()).clamp(min=torch.finfo(size.dtype).tiny)
        error = (gradient - self._exact).norm() / size
        return GradientError(name, cosine.item(), error.item(), len(self.tensors), num_products)
