"""L4. Approximate adjoints that cut the Neumann series of (I - J^T)^-1 short.

    u = sum_{i<k} (J^T)^i g

k = 1 is Jacobian-free backpropagation, JFB (Fung et al., "JFB: Jacobian-Free Backpropagation for Implicit Networks",
AAAI 2022, arXiv 2103.12803). For a contraction with factor c the error of u is at most c^k |g| / (1 - c).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from deqkit.adjoints.base import Adjoint, Evaluation, Problem, ProductGraph, refuse_double_backward, vjp
from deqkit.solvers.base import require_int
from deqkit.state import Blocks, without_autocast


@dataclass(frozen=True)
class NeumannAdjoint(Adjoint):
    """Approximate gradients from the first terms of the Neumann series.

    Args:
        num_terms: k, how many terms; the backward pass takes k - 1 vector-Jacobian products beyond the one that every
            adjoint takes.

    Raises:
        ValueError: num_terms below 1.
    """

    name: ClassVar[str] = "neumann"
    num_terms: int = 5

    def __post_init__(self) -> None:
        require_int(self, "num_terms", minimum=1)

    def attach(self, problem: Problem, x: Blocks) -> Blocks:
        """``x`` with an approximate gradient."""
        at = Evaluation.of(problem.f, x)
        if not at.dependencies.any:
            return x
        products = ProductGraph(at.dependencies)
        return _Neumann.apply(self.num_terms, problem, products, len(x), *at.x, *at.fx)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class JFB(NeumannAdjoint):
    """Jacobian-free backpropagation: approximate gradients, u = g. The Neumann adjoint with one term."""

    name: ClassVar[str] = "jfb"
    num_terms: int = field(default=1, init=False)


class _Neumann(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, num_terms: int, problem: Problem, products: ProductGraph, n: int, *tensors: Tensor) -> Any:
        ctx.num_terms, ctx.problem, ctx.products, ctx.n = num_terms, problem, products, n
        ctx.save_for_backward(*tensors)
        return tuple(x.clone() for x in tensors[:n])

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        refuse_double_backward()
        n, saved = ctx.n, ctx.saved_tensors  # to be read only once: it may be what starts a recomputation
        x, fx = saved[:n], saved[n:]
        with without_autocast(ctx.problem.f.layout.device):
            if ctx.num_terms > 1:
                x, fx = ctx.products.graph(ctx.problem, x, fx)
            u = term = g
            for _ in range(ctx.num_terms - 1):
                term = vjp(fx, x, term)
                u = tuple(torch.add(a, b) for a, b in zip(u, term, strict=True))
        return (None, None, None, None, *(None for _ in x), *u)
