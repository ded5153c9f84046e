"""L4. What the approximate adjoints share: another cotangent of f(x*) in the place of the exact one.

They differ in u alone, with which dL/dtheta ~ u^T df/dtheta. Whatever a backward pass needs beyond x* and f(x*) is
handed to autograd like any other saved tensor, so that activation checkpointing and offloading see it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deqkit import levels
from deqkit.adjoints.base import Adjoint, Evaluation, Problem, ProductGraph, vjp
from deqkit.adjoints.once import constant_below, refuse_double_backward
from deqkit.adjoints.traced import attach_traced, product_at
from deqkit.state import Blocks, without_autocast

Product = Callable[[Blocks], Blocks]


@dataclass(frozen=True)
class ApproximateAdjoint(Adjoint):
    """An adjoint that replaces the solution of u = J^T u + g by something cheaper."""

    @abstractmethod
    def cotangent(
        self, problem: Problem, product: Callable[[], Product], g: Blocks, kept: tuple[Tensor, ...]
    ) -> Blocks:
        """An approximation of u.

        Args:
            problem: the solve, without its record.
            product: gives the map u -> J^T u; it may cost an evaluation of f.
            g: dL/dx*.
            kept: what `kept` returned.
        """

    def kept(self, problem: Problem) -> tuple[Tensor, ...]:
        """Further tensors that the backward pass needs."""
        return ()

    @property
    def traceable(self) -> bool:
        """Unless there is more to a solve than its steps."""
        return self.needs is None

    def attach(self, problem: Problem, x: Blocks) -> Blocks:
        """``x`` with an approximate gradient."""
        if torch.compiler.is_compiling():
            return attach_traced(
                x, problem.f(x), lambda x, g: self.cotangent(problem, lambda: product_at(problem.f, x), g, ())
            )
        at = Evaluation.of(problem.f, constant_below(x))
        if not at.dependencies.any:
            return x
        products, kept = ProductGraph(at.dependencies), self.kept(problem)
        problem = replace(problem, record=None)
        return levels.apply(_Approximate, self, problem, products, len(x), *at.x, *at.fx, *kept)


class _Approximate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, adjoint: ApproximateAdjoint, problem: Problem, products: ProductGraph, n: int, *tensors: Tensor
    ) -> Any:
        ctx.adjoint, ctx.problem, ctx.products, ctx.n = adjoint, problem, products, n
        ctx.save_for_backward(*tensors)
        return tuple(levels.passed_on(x) for x in tensors[:n])

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, *g: Any) -> Any:
        if not ctx.adjoint.has_levels and levels.innermost(g) is not None:
            raise NotImplementedError(
                f"a backward pass under a transform (torch.vmap, is_grads_batched=True) does not go through "
                f"adjoint={ctx.adjoint.name!r}: use another adjoint, or one cotangent at a time"
            )
        n, saved = ctx.n, ctx.saved_tensors  # to be read only once: it may be what starts a recomputation
        x, fx, kept = saved[:n], saved[n : 2 * n], saved[2 * n :]

        def product() -> Product:
            at_x, at_fx = ctx.products.graph(ctx.problem, x, fx)
            return lambda u: vjp(at_fx, at_x, u, create_graph=torch.is_grad_enabled())

        with without_autocast(ctx.problem.f.layout.device):
            u = ctx.adjoint.cotangent(ctx.problem, product, g, kept)
        return (None, None, None, None, *(None for _ in x), *refuse_double_backward(u, fx), *(None for _ in kept))
