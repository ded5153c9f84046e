"""L4. The exact adjoint, by the implicit function theorem.

At x* = f(x*, theta) a cotangent g = dL/dx* reaches the parameters as

    dL/dtheta = u^T df/dtheta,   u = J^T u + g,   J = df/dx at x*

(Bai, Kolter & Koltun, "Deep Equilibrium Models", NeurIPS 2019, theorem 1; for i-FPN: arXiv 2012.13563, eq. 12-13).
The equation for u is itself a fixed-point problem; it goes through the same loop as the forward solve, with a solver, a
tolerance and a limit of its own. Only one evaluation of f is ever held in the autograd graph.

Gradients of parameters that f closes over flow through the graph of that one evaluation, so they need not be named.
Where the backward pass is to be differentiated again (``create_graph=True``), x* may no longer be held constant: f is
evaluated once more at the differentiable x*, u becomes the answer of an implicit solve in its own right, and gradients
are handed to the leaf tensors that f was found to depend on and to the tensors in ``args``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deqkit import levels, stages
from deqkit.adjoints.base import Adjoint, Evaluation, Problem, ProductGraph, vjp
from deqkit.adjoints.dependencies import Dependencies, direct_gradients
from deqkit.adjoints.every_level import solve_at_every_level
from deqkit.adjoints.once import once
from deqkit.adjoints.traced import attach_traced, product_at
from deqkit.ledger import LoopResult
from deqkit.solution import report_failure
from deqkit.solvers import Solver, make_backward_solver
from deqkit.solvers.base import require_float, require_int
from deqkit.state import Blocks, Evaluator, without_autocast
from deqkit.termination import Termination

# Used where the forward solve has only an absolute tolerance, in units that cotangents do not share.
_DEFAULT_RTOL = 1e-4

_NEST = (
    "torch.autograd differentiates a gradient of a solve again, inside one torch.func transform: nest torch.func.grad, "
    "vjp or jvp instead"
)

_FORWARD_OVER_REVERSE = (
    "forward-mode over reverse-mode differentiation by torch.autograd does not go through adjoint='implicit': use "
    "torch.func.jvp of torch.func.grad, or torch.no_grad() for the tangent alone"
)


@dataclass(frozen=True)
class ImplicitAdjoint(Adjoint):
    """Exact gradients from the implicit function theorem, in the memory of one evaluation of f.

    Args:
        solver: name or settings of the backward solver.
        rtol: relative tolerance of the adjoint solve, on |J^T u + g - u| / |J^T u + g|; None takes the forward one.
        max_steps: step limit of the adjoint solve; None takes the forward one.

    Raises:
        ValueError: an unknown solver, one in mixed precision, or a setting out of range.
    """

    name: ClassVar[str] = "implicit"
    has_levels: ClassVar[bool] = True
    solver: str | Solver = "anderson"
    rtol: float | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        make_backward_solver(self.solver)
        if self.rtol is not None:
            require_float(self, "rtol", 0.0, float("inf"))
        if self.max_steps is not None:
            require_int(self, "max_steps", minimum=0)

    def attach(self, problem: Problem, x: Blocks) -> Blocks:
        """``x`` with the exact gradient."""
        if torch.compiler.is_compiling():
            return self._attach_traced(problem, x)
        at = Evaluation.of(problem.f, x)
        if not at.dependencies.any:
            return x
        if problem.f.drops_tangents and any(_has_tangent(t) for t in at.dependencies.tensors):
            raise NotImplementedError(_FORWARD_OVER_REVERSE)
        return levels.apply(_Implicit, self, problem, at.dependencies, len(x), *at.x, *at.fx, *at.dependencies.tensors)

    @property
    def traceable(self) -> bool:
        """Where the adjoint solve takes a fixed number of steps, too."""
        return not self.rtol

    def with_tangent(self, problem: Problem, x: Blocks) -> Blocks:
        """``x`` with its tangent v, the fixed point of v = J v + df/dtheta dtheta.

        The right-hand side is the tangent of f at the dual number (x, v): one more fixed-point problem.

        Raises:
            NotImplementedError: x carries a graph, too: that tangent would have none.
        """
        f = copy.copy(problem.f)
        f.drops_tangents = False
        fx = f(x)
        problem.f.num_calls += 1
        if not any(_has_tangent(b) for b in fx):
            return x
        if any(b.requires_grad for b in x):
            raise NotImplementedError(_FORWARD_OVER_REVERSE)

        def tangent_of_f(v: Blocks) -> Blocks:
            return _tangents(f(tuple(forward_ad.make_dual(b, t) for b, t in zip(x, v, strict=True))))

        v = self.solve_linear(problem, tangent_of_f, _tangents(fx), "tangent solve", (levels.depth(), "forward"))
        return tuple(forward_ad.make_dual(b, t) for b, t in zip(x, v, strict=True))

    def termination(self, problem: Problem) -> Termination:
        """When the adjoint solve of ``problem`` is done."""
        rtol = self.rtol
        if rtol is None:
            rtol = problem.rtol or (_DEFAULT_RTOL if problem.atol else 0.0)
        return Termination(rtol)

    def limit(self, problem: Problem) -> int:
        """The step limit of the adjoint solve of ``problem``."""
        return problem.max_steps if self.max_steps is None else self.max_steps

    def _attach_traced(self, problem: Problem, x: Blocks) -> Blocks:
        layout = problem.f.layout.of_blocks(x)

        def cotangent(x: Blocks, g: Blocks) -> Blocks:
            product = product_at(problem.f, x)
            f = Evaluator(lambda u: tuple(torch.add(a, b) for a, b in zip(product(u), g, strict=True)), layout)
            with torch.no_grad(), without_autocast(layout.device):
                return self._run(replace(problem, f=f), g, "adjoint solve").x

        return attach_traced(x, problem.f(x), cotangent)

    def solve(self, problem: Problem, x: Blocks, fx: Blocks, g: Blocks) -> Blocks:
        """The fixed point of u = J^T u + g, without gradient at the level of x and fx; starts from u = g."""

        def adjoint_map(u: Blocks) -> Blocks:
            products = vjp(fx, x, u, create_graph=torch.is_grad_enabled())
            return tuple(torch.add(a, b) for a, b in zip(products, g, strict=True))

        return self.solve_linear(problem, adjoint_map, g, "adjoint solve", (levels.level_of(x[0]), "reverse"))

    def solve_linear(
        self,
        problem: Problem,
        f: Callable[[Blocks], Blocks],
        start: Blocks,
        what: str,
        own: tuple[int | None, str] = (0, "reverse"),
    ) -> Blocks:
        """The fixed point of a linear map, entered in ``problem.stats``.

        Args:
            problem: what is differentiated.
            f: the map.
            start: where to start.
            what: what it is called.
            own: see `solve_at_every_level`.
        """
        # A tangent has none itself, at its own level.
        evaluator = Evaluator(f, problem.f.layout.of_blocks(start), keeps_tangents=own[1] == "forward")
        linear = replace(problem, f=evaluator)
        return solve_at_every_level(self, linear, start, functools.partial(self._run, what=what), own=own).x

    def _run(self, problem: Problem, start: Blocks, what: str) -> LoopResult:
        solver, termination = make_backward_solver(self.solver), self.termination(problem)
        result = stages.run(problem.f, start, solver, termination, max_steps=self.limit(problem), norm=problem.norm)
        if torch.compiler.is_compiling():  # a graph reports nothing
            return result
        stats, per_sample = problem.stats, problem.f.layout.per_sample
        stats.status, stats.num_steps = per_sample(result.status), per_sample(result.num_steps)
        stats.residual, stats.relative_residual = per_sample(result.residual), per_sample(result.relative_residual)
        stats.num_fn_evals, stats.solver = problem.f.num_calls, solver.name
        stats.rtol, stats.atol = termination.rtol, termination.atol
        report_failure(
            problem.on_failure,
            what,
            stats,
            rtol=termination.rtol,
            atol=termination.atol,
            resolution=problem.f.layout.resolution,
            stacklevel=2,
        )
        return result


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def _tangents(blocks: Blocks) -> Blocks:
    tangents = [forward_ad.unpack_dual(b).tangent for b in blocks]
    return tuple(torch.zeros_like(b) if t is None else t for t, b in zip(tangents, blocks, strict=True))


class _Implicit(torch.autograd.Function):
    """x* with u as the cotangent of f(x*)."""

    @staticmethod
    def forward(
        ctx: Any, adjoint: ImplicitAdjoint, problem: Problem, dependencies: Dependencies, n: int, *tensors: Tensor
    ) -> Any:
        ctx.adjoint, ctx.problem, ctx.n = adjoint, problem, n
        ctx.products = ProductGraph(dependencies)
        ctx.set_materialize_grads(False)
        # Not the dependencies: f itself saves those whose values its derivative takes.
        ctx.save_for_backward(*tensors[: 2 * n])
        # Copies: the caller may change the value in place, the point that f was differentiated at must stay.
        return tuple(levels.passed_on(x) for x in tensors[:n])

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, *g: Any) -> Any:
        n, saved = ctx.n, ctx.saved_tensors  # to be read only once: it may be what starts a recomputation
        x, fx, dependencies = saved[:n], saved[n:], ctx.products.dependencies
        before, after = (None,) * (4 + n), (None,) * len(dependencies.tensors)
        if all(b is None for b in g):  # behind a closed barrier
            return (*before, *(None for _ in fx), *after)
        g = tuple(torch.zeros_like(b) if c is None else c for c, b in zip(g, x, strict=True))
        with without_autocast(ctx.problem.f.layout.device):
            u = ctx.adjoint.solve(ctx.problem, *ctx.products.graph(ctx.problem, x, fx), g)
            if not torch.is_grad_enabled():
                return (*before, *u, *after)
            if levels.level_of(x[0]) != 0 or levels.innermost(g) is not None:
                return (*before, *once(u, fx, _NEST), *after)
            if not dependencies.complete:
                raise RuntimeError(
                    "double backward through a solve: f closes over a tensor that is itself the result of "
                    "differentiable operations. Pass such tensors in args= and let f use them only as its arguments "
                    "(parameters and other leaf tensors may stay where they are). Or let torch.func.grad, vjp or jvp, "
                    "nested, take all derivatives."
                )
            x_star: Any = _Implicit.apply(ctx.adjoint, ctx.problem, dependencies, n, *x, *fx, *dependencies.tensors)
            grads = _differentiable_gradients(ctx.adjoint, ctx.problem, x_star, u, g, fx, dependencies)
        return (*before, *(None for _ in fx), *grads)


def _differentiable_gradients(
    adjoint: ImplicitAdjoint,
    problem: Problem,
    x_star: Blocks,
    u: Blocks,
    g: Blocks,
    fx: Blocks,
    dependencies: Dependencies,
) -> tuple[Tensor | None, ...]:
    """u^T df/dt at ``x_star`` for every dependency t, as differentiable functions of the dependencies, x* and g."""

    def adjoint_map(u: Blocks, x_star: Blocks, g: Blocks, args: tuple[Any, ...]) -> Blocks:
        fx = problem.f.with_args(args)(x_star)
        return tuple(torch.add(a, b) for a, b in zip(vjp(fx, x_star, u, create_graph=True), g, strict=True))

    f = Evaluator(adjoint_map, problem.f.layout.of_blocks(u), (x_star, g, problem.f.args))
    u = adjoint.attach(replace(problem, f=f), u)
    # u has every way through x* in it already.
    return direct_gradients(problem.f, x_star, u, fx, dependencies)
