"""L4. What an evaluation of f depends on besides its first argument, and derivatives towards just that.

Only a backward pass that is itself differentiated needs this: an ordinary one lets autograd find the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from deqkit.state import Blocks, Evaluator


@dataclass
class Dependencies:
    """The tensors that an evaluation of f was found to depend on.

    Attributes:
        tensors: tensors in ``args`` that require grad, and leaf tensors that f closes over.
        complete: False when f also closes over a tensor with a graph of its own, which can't be named from here.
    """

    tensors: list[Tensor]
    complete: bool


def find_dependencies(fx: Blocks, x: Blocks, args: tuple[Any, ...]) -> Dependencies:
    """Walk the graph of one evaluation of f at ``x`` down to what lay there before it.

    Autograd numbers its nodes in the order in which a thread makes them, so a node older than those of ``x`` belongs to
    something that f closes over.
    """
    first_node = min(b.grad_fn._sequence_nr() for b in x if b.grad_fn is not None)
    named = {id(t): t for t in _differentiable(args)}
    edges = {(t.grad_fn, t.output_nr) for t in (*x, *named.values()) if t.grad_fn is not None}
    complete = True
    seen: set[Any] = set()
    todo = [(b.grad_fn, b.output_nr) for b in fx]
    while todo:
        node, output_nr = todo.pop()
        if node is None or (node, output_nr) in edges:
            continue
        variable = getattr(node, "variable", None)  # of the node that accumulates into a leaf
        if variable is not None:
            named.setdefault(id(variable), variable)
        elif node._sequence_nr() < first_node:
            complete = False
        elif node not in seen:
            seen.add(node)
            todo.extend(node.next_functions)
    return Dependencies(list(named.values()), complete)


def direct_gradients(f: Evaluator, x: Blocks, u: Blocks, tensors: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """u^T df/dt for each of ``tensors``, counting only what f takes from it directly.

    ``x`` and the tensors may well depend on one another: those ways are left out of the gradients. They are not left
    out of the graph of the gradients, whose value does change with x.

    Args:
        f: the map; tensors in its args are among ``tensors``.
        x: where to evaluate it.
        u: the cotangent of f(x).
        tensors: what `find_dependencies` found.
    """
    barrier = _Barrier()
    aliases = {id(t): _Barred.apply(t, barrier) for t in _differentiable(f.args)}
    args = tree_map(lambda t: aliases.get(id(t), t), f.args)
    barred_x: Any = tuple(_Barred.apply(b, barrier) for b in x)
    fx = Evaluator(f.f, f.layout, args)(barred_x)
    # A leaf tensor in args may also be closed over: it is asked for under both names.
    wanted: dict[Any, Tensor] = {("alias", key): alias for key, alias in aliases.items()}  # pyright: ignore
    wanted |= {("leaf", id(t)): t for t in tensors if t.is_leaf}
    found = torch.autograd.grad(fx, list(wanted.values()), u, create_graph=True, allow_unused=True)
    barrier.closed = False
    grads = dict(zip(wanted, found, strict=True))
    return tuple(_sum([grads.get((kind, id(t))) for kind in ("alias", "leaf")]) for t in tensors)


def _differentiable(args: tuple[Any, ...]) -> list[Tensor]:
    return list({id(t): t for t in tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad}.values())


def _sum(terms: list[Tensor | None]) -> Tensor | None:
    present = [t for t in terms if t is not None]
    return sum(present[1:], start=present[0]) if present else None


@dataclass
class _Barrier:
    closed: bool = True


class _Barred(torch.autograd.Function):
    """Identity whose gradient passes only while its barrier is open."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, barrier: _Barrier) -> Tensor:
        ctx.barrier = barrier
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return (None if ctx.barrier.closed else grad_outputs[0]), None
