"""L6. How far an adjoint's gradient is from the exact one, so that a cheaper adjoint can be chosen by evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from deqkit.adjoints import Adjoint, ImplicitAdjoint, make_adjoint
from deqkit.adjoints.base import Evaluation, Problem
from deqkit.norms import l2
from deqkit.solution import AdjointStats
from deqkit.state import Evaluator, StateLayout

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

    Returns:
        A `GradientError`.

    Raises:
        ValueError: nothing that f depends on requires a gradient, the exact gradient is zero, the cotangent does not
            fit, or the adjoint is "unrolled", whose gradient belongs to the way to x and not to x.
        ConvergenceError: the exact adjoint solve does not converge: there is nothing to compare with.
    """
    adjoint = make_adjoint(adjoint)
    if adjoint.unrolls:
        raise ValueError(
            "adjoint='unrolled' differentiates the steps towards x, which are not known here; compare gradients of "
            "deqkit.solve itself"
        )
    return ExactGradient(
        f, x, args=args, cotangent=cotangent, batch_dims=batch_dims, max_steps=max_steps
    ).compare(adjoint)  # fmt: skip


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
        self.cotangent, spec = tree_flatten(cotangent)
        shapes = [leaf.shape for leaf in tree_leaves(self._x)]
        if spec != self._layout.treespec or [leaf.shape for leaf in self.cotangent] != shapes:
            raise ValueError("cotangent must have the structure and the shapes of x")
        exact = ImplicitAdjoint("gmres", rtol=10 * self._layout.resolution, max_steps=max_steps)
        self._exact, _ = self._gradient(exact, on_failure="raise")
        if not bool(torch.isfinite(self._exact).all()):
            raise ValueError(
                "the exact gradient is not finite: f, or its derivative towards what it depends on, is not"
            )
        if self._exact.norm() == 0:
            raise ValueError("the exact gradient is zero: there is no direction to compare with")

    def compare(self, adjoint: Adjoint, *, rtol: float = _RTOL, max_steps: int = _MAX_STEPS) -> GradientError:
        """The gradient that an adjoint gives at the fixed point, after a solve with ``rtol`` and ``max_steps``."""
        gradient, num_products = self._gradient(adjoint, rtol=rtol, max_steps=max_steps)
        return self._measure(adjoint.name, gradient, num_products)

    def compare_value(self, adjoint: Adjoint, value: Any, num_products: Callable[[], int | None]) -> GradientError:
        """The gradient that the ``value`` of a solve carries; ``num_products`` is called once it has been taken."""
        return self._measure(adjoint.name, self._gradient_of(tree_leaves(value)), num_products())

    def _evaluator(self) -> Evaluator:
        return Evaluator(self._f, self._layout, self._args)

    def _gradient(
        self, adjoint: Adjoint, *, rtol: float = _RTOL, max_steps: int = _MAX_STEPS, on_failure: str = "ignore"
    ) -> tuple[Tensor, int | None]:
        """The gradient towards all tensors, and the products that its adjoint solve took."""
        problem = Problem(self._evaluator(), l2, rtol, 0.0, max_steps, on_failure, AdjointStats())
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
