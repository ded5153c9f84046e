"""L4. What cannot be differentiated a second time says so when it is tried, at whatever level that may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deqkit import levels
from deqkit.state import Blocks


class _Refusal(torch.autograd.Function):
    """Identity that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recorded: Tensor, message: str, below: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.message = message
        return levels.passed_on(x, by=below)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError(ctx.message)


def once(u: Blocks, fx: Blocks, message: str) -> Blocks:
    """``u`` as a cotangent of ``fx`` that cannot be differentiated at their level of torch.func, and can be at others.

    A backward pass at such a level cannot know whether it will be differentiated at that level, too.

    Args:
        u: the cotangent.
        fx: what it is one of; it has a graph of that level.
        message: of the error that is raised if it is tried.

    Raises:
        NotImplementedError: another transform runs that the solve did not run under.
    """
    level = levels.level_of(fx[0])
    if level is None:
        return u
    if level == 0 or level != levels.depth():
        raise NotImplementedError(
            "torch.vmap of torch.autograd.grad(create_graph=True) does not go through a solve: use torch.func.vjp or "
            "jacrev"
        )
    return tuple(levels.apply(_Refusal, a, b, message, levels.view) for a, b in zip(u, fx, strict=True))


_TWICE = (
    "an approximate adjoint (jfb, neumann, phantom, shine) cannot be differentiated twice: the second derivative would "
    "lack the term through x*. Use adjoint='implicit' or 'unrolled' for that (create_graph=True, or nested "
    "torch.func.grad)."
)


def refuse_double_backward(u: Blocks, fx: Blocks) -> Blocks:
    """Stop a backward pass of an approximate adjoint that is itself to be differentiated: ``u``, or the like of `once`.

    An approximate adjoint treats x* as a constant, so the derivative of its gradient would lack a term.

    Raises:
        RuntimeError: gradients are enabled, as they are in a backward pass under ``create_graph=True``.
    """
    if not torch.is_grad_enabled():
        return u
    if levels.level_of(fx[0]) == 0:
        raise RuntimeError(_TWICE)
    return once(u, fx, _TWICE)


def constant_below(x: Blocks) -> Blocks:
    """``x`` for an approximate adjoint: what it makes of x*, no level below can differentiate towards x*."""

    def refusing(b: Tensor) -> Tensor:
        level = levels.innermost()
        if (level is None or level.reverse) and b.requires_grad:
            return levels.apply(_Refusal, b, b, _TWICE, refusing if level else levels.view)
        return levels.at_next_below(refusing, b) if level else b

    return tuple(levels.at_next_below(refusing, b) for b in x) if levels.active() else x
