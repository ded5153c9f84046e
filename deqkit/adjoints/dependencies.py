"""L4. What an evaluation of f depends on besides its first argument, and derivatives towards just that.

An ordinary backward pass lets autograd find the way; it needs this only to know whether there is one. A backward pass
that is itself differentiated needs all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from deqkit import compiled, linalg
from deqkit.state import Blocks, Evaluator


@dataclass
class Dependencies:
    """The tensors that an evaluation of f was found to depend on.

    Attributes:
        tensors: tensors in ``args``, and leaf tensors that f closes over.
        complete: False when f also closes over a tensor with a graph of its own, which can't be named from here.
    """

    tensors: list[Tensor]
    complete: bool

    @property
    def any(self) -> bool:
        """Whether anything needs a gradient."""
        return bool(self.tensors) or not self.complete


@dataclass
class Aliases:
    """Arguments of f in which every tensor that requires grad has a graph of its own.

    What f takes from such a tensor as an argument is thereby told from what it takes from the same one otherwise.

    Attributes:
        args: the arguments.
        pairs: every tensor that requires grad and what stands for it in ``args``.
    """

    args: tuple[Any, ...]
    pairs: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, args: tuple[Any, ...], alias: Callable[[Tensor], Tensor] = lambda t: t.view_as(t)) -> Aliases:
        """Aliases of the tensors in ``args``, each made by ``alias``."""
        found = {id(t): t for t in tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad}
        # Sparse tensors have no views: they stand for themselves.
        pairs = {key: (t, alias(t) if t.layout == torch.strided else t) for key, t in found.items()}
        return cls(tree_map(lambda t: pairs[id(t)][1] if id(t) in pairs else t, args), list(pairs.values()))


def find_dependencies(fx: Blocks, x: Blocks, aliases: Aliases) -> Dependencies:
    """Walk the graph of one evaluation of f at ``x`` and ``aliases.args`` down to what lay there before it.

    Autograd numbers its nodes in the order in which a thread makes them, so a node older than those of ``x`` belongs to
    something that f closes over. The numbers of another thread say nothing: a graph that f closes over and that another
    thread has made may be taken for a part of f, and is then followed down to its leaves.
    """
    first_node = min(b.grad_fn._sequence_nr() for b in x if b.grad_fn is not None)
    edges = {(alias.grad_fn, alias.output_nr): t for t, alias in aliases.pairs if alias.grad_fn is not None}
    ends = {(b.grad_fn, b.output_nr) for b in x}
    found: dict[int, Tensor] = {}
    complete = True
    seen: set[Any] = set()
    todo = [(b.grad_fn, b.output_nr) for b in fx]
    while todo:
        node, output_nr = todo.pop()
        if node is None or (node, output_nr) in ends or _is_cut(node):
            continue
        variable = getattr(node, "variable", None)  # of the node that accumulates into a leaf
        tensor = edges.get((node, output_nr), variable)
        if tensor is not None:
            found[id(tensor)] = tensor
        elif node._sequence_nr() < first_node:
            complete = False
        elif node not in seen:
            seen.add(node)
            todo.extend(node.next_functions)
    return Dependencies(list(found.values()), complete)


def _is_cut(node: Any) -> bool:
    """Whether it is the point that a solve inside of f was differentiated at, another one in every evaluation."""
    return getattr(getattr(node, "_forward_cls", None), "cuts", False)


def check_same_function(
    f: Evaluator, fx: Blocks, dependencies: Dependencies, again: Blocks, dependencies_again: Dependencies
) -> None:
    """Refuse a second evaluation of f at the same point that is not the first one over again.

    Args:
        f: the map.
        fx: its value in the forward pass.
        dependencies: what that depended on.
        again: its value now.
        dependencies_again: what that depends on.

    Raises:
        RuntimeError: another value, or other tensors to be differentiated towards.
    """
    same = {id(t) for t in dependencies.tensors} == {id(t) for t in dependencies_again.tensors}
    # What lies behind a graph that f closes over is not found the same way in every thread.
    differs = dependencies.complete and not (same and dependencies_again.complete)
    if not differs:
        with torch.no_grad():
            change = linalg.norm(tuple(torch.sub(a, b) for a, b in zip(again, fx, strict=True)))
            differs = bool((change > math.sqrt(f.resolution) * linalg.norm(fx)).any())
    if differs:
        raise RuntimeError(
            "f is not the function it was in the forward pass: it gives another value, or depends on other tensors, "
            "at the same point. It has to be evaluated again here (under create_graph=True, or where saved tensors are "
            "packed away, as by activation checkpointing), so let nothing that it uses change before the backward "
            "pass: variables it closes over, parameters, train() or eval(), random numbers."
        )


def direct_gradients(
    f: Evaluator, x: Blocks, u: Blocks, fx: Blocks, dependencies: Dependencies
) -> tuple[Tensor | None, ...]:
    """u^T df/dt for each of the dependencies, counting only what f takes from it directly.

    ``x`` and the tensors may well depend on one another: those ways are left out of the gradients. They are not left
    out of the graph of the gradients, whose value does change with x.

    Args:
        f: the map.
        x: where to evaluate it.
        u: the cotangent of f(x).
        fx: the value of f at x in the forward pass.
        dependencies: what that depended on.
    """
    barrier = _Barrier()
    aliases = Aliases.of(f.args, lambda t: _Barred.apply(t, barrier))  # pyright: ignore[reportArgumentType]
    barred_x: Any = tuple(_Barred.apply(b, barrier) for b in x)
    again = f.with_args(aliases.args)(barred_x)
    check_same_function(f, fx, dependencies, again, find_dependencies(again, barred_x, aliases))
    # A leaf tensor in args may also be closed over: it is asked for under both names.
    wanted: dict[Any, Tensor] = {("alias", id(t)): alias for t, alias in aliases.pairs}
    wanted |= {("leaf", id(t)): t for t in dependencies.tensors if t.is_leaf}
    found = grad_of_present(again, tuple(wanted.values()), u, create_graph=True)
    barrier.closed = False
    grads = dict(zip(wanted, found, strict=True))
    return tuple(_sum([grads.get((kind, id(t))) for kind in ("alias", "leaf")]) for t in dependencies.tensors)


def grad_of_present(
    outputs: Blocks, inputs: tuple[Tensor, ...], cotangents: Blocks, *, create_graph: bool
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` that keeps the graph, and allows outputs that depend on nothing and inputs not used."""
    present = [(t, g) for t, g in zip(outputs, cotangents, strict=True) if t.requires_grad]
    if not present or not inputs:
        return (None,) * len(inputs)
    outputs, cotangents = zip(*present, strict=True)
    settings = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True}
    try:
        return torch.autograd.grad(outputs, inputs, cotangents, **settings)
    except RuntimeError as error:
        if not (compiled.is_refusal(error) and compiled.let_be_kept(outputs)):
            raise
    return torch.autograd.grad(outputs, inputs, cotangents, **settings)


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
