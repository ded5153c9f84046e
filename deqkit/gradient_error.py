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
    x = tree_map(lambda leaf: leaf.detach(), x)
    layout = StateLayout(x, batch_dims)
    with torch.enable_grad():
        tensors = Evaluation.of(Evaluator(f, layout, args), layout.pack(x)).dependencies.tensors
    if not tensors:
        raise ValueError("f depends on no leaf tensor or tensor in args that requires a gradient")
    if cotangent is None:
        cotangent = tree_map(torch.randn_like, x)
    leaves, spec = tree_flatten(cotangent)
    if spec != layout.treespec or [leaf.shape for leaf in leaves] != [leaf.shape for leaf in tree_leaves(x)]:
        raise ValueError("cotangent must have the structure and the shapes of x")

    exact = ImplicitAdjoint("gmres", rtol=10 * layout.resolution, max_steps=max_steps)
    reference, _ = _gradient(Evaluator(f, layout, args), x, exact, leaves, tensors, on_failure="raise")
    gradient, num_products = _gradient(Evaluator(f, layout, args), x, adjoint, leaves, tensors, on_failure="ignore")
    size = reference.norm()
    if size == 0:
        raise ValueError("the exact gradient is zero: there is no direction to compare with")
    cosine = torch.dot(gradient, reference) / (size * gradient.norm()).clamp(min=torch.finfo(size.dtype).tiny)
    error = (gradient - reference).norm() / size
    return GradientError(adjoint.name, cosine.item(), error.item(), len(tensors), num_products)


def _gradient(
    f: Evaluator, x: Any, adjoint: Adjoint, cotangent: list[Tensor], tensors: list[Tensor], *, on_failure: str
) -> tuple[Tensor, int | None]:
    """The gradient towards all tensors as one float64 vector, and the products that its adjoint solve took."""
    problem = Problem(f, l2, _RTOL, 0.0, _MAX_STEPS, on_failure, AdjointStats())
    with torch.enable_grad():
        value = tree_leaves(f.layout.unpack(adjoint.attach(problem, f.layout.pack(x))))
    found = torch.autograd.grad(value, tensors, cotangent, allow_unused=True)
    parts = [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]
    flat = [torch.view_as_real(g) if g.is_complex() else g for g in parts]
    products = problem.stats.num_fn_evals if problem.stats.status is not None else None
    return torch.cat([g.reshape(-1).double() for g in flat]), products
