"""L4. A gradient that a compiler can trace: no graph is walked, and none is kept between the passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deqkit.state import Blocks, Evaluator


class _Traced(torch.autograd.Function):
    """x* with a cotangent of f(x*) that is computed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, cotangent: Callable[[Blocks, Blocks], Blocks], n: int, *tensors: Tensor) -> Any:
        ctx.cotangent = cotangent
        ctx.save_for_backward(*tensors[:n])
        return tuple(x.clone() for x in tensors[:n])

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        u = ctx.cotangent(ctx.saved_tensors, g)
        return (None, None, *(None for _ in u), *u)


def attach_traced(x: Blocks, fx: Blocks, cotangent: Callable[[Blocks, Blocks], Blocks]) -> Blocks:
    """``x`` with a gradient through ``fx``.

    Args:
        x: the point.
        fx: f at the point, or whatever else leads to the parameters.
        cotangent: that of ``fx``, from x and its cotangent.
    """
    return _Traced.apply(cotangent, len(x), *x, *fx)  # pyright: ignore[reportReturnType]


def product_at(f: Evaluator, x: Blocks) -> Callable[[Blocks], Blocks]:
    """The map u -> J^T u for J = df/dx at ``x``, by an evaluation of its own, which nobody counts."""
    product = torch.func.vjp(lambda x: f.with_args(f.args)(x), x)[1]
    return lambda u: product(u)[0]
