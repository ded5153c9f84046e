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

from deqkit.adjoints.base import Adjoint, Evaluation, Problem, ProductGraph, refuse_double_backward
from deqkit.state import Blocks, without_autocast

Graph = Callable[[], tuple[Blocks, Blocks]]


@dataclass(frozen=True)
class ApproximateAdjoint(Adjoint):
    """An adjoint that replaces the solution of u = J^T u + g by something cheaper."""

    @abstractmethod
    def cotangent(self, problem: Problem, graph: Graph, g: Blocks, kept: tuple[Tensor, ...]) -> Blocks:
        """An approximation of u.

        Args:
            problem: the solve, without its record.
            graph: gives x* and f(x*) with the graph of one evaluation between them, see `deqkit.adjoints.base.vjp`.
            g: dL/dx*.
            kept: what `kept` returned.
        """

    def kept(self, problem: Problem) -> tuple[Tensor, ...]:
        """Further tensors that the backward pass needs."""
        return ()

    def attach(self, problem: Problem, x: Blocks) -> Blocks:
        """``x`` with an approximate gradient."""
        at = Evaluation.of(problem.f, x)
        if not at.dependencies.any:
            return x
        products, kept = ProductGraph(at.dependencies), self.kept(problem)
        problem = replace(problem, record=None)
        return _Approximate.apply(self, problem, products, len(x), *at.x, *at.fx, *kept)  # pyright: ignore[reportReturnType]


class _Approximate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, adjoint: ApproximateAdjoint, problem: Problem, products: ProductGraph, n: int, *tensors: Tensor
    ) -> Any:
        ctx.adjoint, ctx.problem, ctx.products, ctx.n = adjoint, problem, products, n
        ctx.save_for_backward(*tensors)
        return tuple(x.clone() for x in tensors[:n])

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        refuse_double_backward()
        n, saved = ctx.n, ctx.saved_tensors  # to be read only once: it may be what starts a recomputation
        x, fx, kept = saved[:n], saved[n : 2 * n], saved[2 * n :]
        with without_autocast(ctx.problem.f.layout.device):
            u = ctx.adjoint.cotangent(ctx.problem, lambda: ctx.products.graph(ctx.problem, x, fx), g, kept)
        return (None, None, None, None, *(None for _ in x), *u, *(None for _ in kept))
