"""L0. What stays the same in every evaluation of one solve: weights computed from parameters, masks drawn at random.

A parametrised weight or a dropout mask is a part of f. For f to be a function while it is solved for and
differentiated, the weight is to be computed once, with its gradient, and the mask to be drawn once. So every solve
opens a scope: the first use of a weight or mask in it makes it, every later one gets the same, also in a backward pass
that evaluates f again, in whichever thread. Weights travel as an argument of f, so that a solve differentiates towards
them as towards any other argument, twice where that is asked for.

`torch.nn.utils.parametrize.cached` is no base for this: it gives a deep copy of a module the weights of the original,
is shared by all threads, keeps a weight without gradient where a solve computes it first, and has ended by the time of
a backward pass. Within a scope it does no harm.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from deqkit.state import without_autocast


class _Optimizers:
    """Counts the steps of all optimisers, of which fused ones leave no trace on the parameters that they write to."""

    def __init__(self) -> None:
        self.num_steps, self.watched = 0, False

    def watch(self) -> None:
        if not self.watched:
            self.watched = True
            register_optimizer_step_post_hook(self.count)

    def count(self, *_: Any) -> None:
        self.num_steps += 1


_optimizers = _Optimizers()


def watch_optimizers() -> None:
    """Have the steps of optimisers noticed from here on, for scopes that outlive one."""
    _optimizers.watch()


class _Source:
    """The tensors that a weight was computed from, as they were."""

    def __init__(self, tensors: Sequence[Tensor], with_grad: bool) -> None:
        self.tensors, self.states, self.with_grad = list(tensors), _states(tensors), with_grad
        self.num_steps = _optimizers.num_steps

    def is_still(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, and have been neither written to nor moved."""
        same = len(tensors) == len(self.tensors) and all(a is b for a, b in zip(tensors, self.tensors, strict=True))
        return same and self.num_steps == _optimizers.num_steps and _states(tensors) == self.states


@dataclass(slots=True)
class Scope:
    """What is held, and for whom.

    Attributes:
        with_grad: whether weights are to carry gradients.
        weights: each with its source, by who computes it; a pytree whose leaves are the weights. None where each solve
            is to hold its own, and nothing else any.
        masks: by whatever tells them apart.
        checkpoint: see `checkpoint_hook`, at the time when the scope was entered.
    """

    with_grad: bool
    weights: dict[Hashable, tuple[Tensor, _Source]] | None
    masks: dict[Hashable, Tensor]
    checkpoint: Any = None

    @property
    def is_checkpointed(self) -> bool:
        """Whether f itself recomputes what runs now in the backward pass, where this scope will not be known."""
        return torch.is_grad_enabled() and checkpoint_hook() is not self.checkpoint

    def bind(self, f: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """F, which enters this scope whenever and wherever it is called, and its arguments, foremost the weights."""

        def in_scope(x: Any, weights: Any, *args: Any) -> Any:
            before = _local.scope  # no block of `Entered`: this is on the way of every evaluation
            if torch.compiler.is_compiling() and before is not None and before.weights is weights:
                return f(x, *args)  # see `around_a_trace`
            _local.scope = Scope(self.with_grad, weights, self.masks, checkpoint_hook())
            try:
                return f(x, *args)
            finally:
                _local.scope = before

        return in_scope, (self.weights, *args)

    def around_a_trace(self) -> contextlib.AbstractContextManager[None]:
        """Enter this scope around all of a solve that is being compiled: a backward pass that is traced enters none."""
        return Entered(self) if torch.compiler.is_compiling() else contextlib.nullcontext()


class _Local(threading.local):
    def __init__(self) -> None:
        self.scope: Scope | None = None


_local = _Local()


def current() -> Scope | None:
    """The scope that this thread is in."""
    return _local.scope


class Entered:
    """Puts a thread into a scope, or with None into none, for the time of a block, any number of times."""

    def __init__(self, scope: Scope | None) -> None:
        self.scope = scope
        self.before: list[Scope | None] = []

    def __enter__(self) -> None:
        self.before.append(_local.scope)
        _local.scope = None if self.scope is None else replace(self.scope, checkpoint=checkpoint_hook())

    def __exit__(self, *_: Any) -> None:
        _local.scope = self.before.pop()


def opened() -> Scope:
    """A scope for whoever asks now: it shares all with the one around it, if there is one."""
    around, with_grad = _local.scope, torch.is_grad_enabled()
    if around is None:
        return Scope(with_grad, {}, {})
    if around.weights is None or (with_grad and not around.with_grad):  # where they are of no use
        return Scope(with_grad, {}, around.masks)
    return around


def mask(key: Hashable, draw: Callable[[], Tensor]) -> Tensor:
    """The mask that is told apart by ``key``, drawn once per scope. Called within one only."""
    scope = _local.scope
    assert scope is not None
    found = scope.masks.get(key)
    if found is None:
        with _recordable():
            found = scope.masks[key] = draw()
    return found


def weight(key: Hashable, source: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
    """The weight that ``key`` computes from ``source``, computed once per scope.

    A scope does not outlive a change of the source: then the weight is computed anew.
    """
    scope = _local.scope
    if scope is None or scope.weights is None or scope.is_checkpointed:
        return compute()
    found = scope.weights.get(key)
    if found is not None and found[1].is_still(source) and (found[1].with_grad or not torch.is_grad_enabled()):
        return found[0]
    with_grad = scope.with_grad or torch.is_grad_enabled()
    if torch.compiler.is_compiling() and with_grad and not torch.is_grad_enabled():
        return compute()  # a graph compiled without gradients would hand out a weight without
    # A cast that autocast has cached without gradients would be used again.
    with _recordable(source), torch.set_grad_enabled(with_grad), without_autocast(source[0].device), _unpacked():
        value = compute()
    scope.weights[key] = (value, _Source(source, with_grad))
    return value


def _recordable(source: Sequence[Tensor] = ()) -> contextlib.AbstractContextManager[Any]:
    """What is made here may be used with gradients later on, though it is inference mode now."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or any(t.is_inference() for t in source):
        return contextlib.nullcontext()
    return torch.inference_mode(False)


def _unpacked() -> contextlib.AbstractContextManager[None]:
    """Keep saved tensors where they are: no recomputation would compute the weight again, as it is held."""
    if checkpoint_hook() is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def checkpoint_hook() -> Any:
    """What marks the innermost activation checkpoint that runs now for the first time or once more; None outside."""
    if torch.compiler.is_compiling():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore
    # Others, which offload saved tensors or count them, compute nothing again.
    return hooks[0] if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint" else None


def _states(tensors: Sequence[Tensor]) -> list[tuple[int, torch.dtype, torch.device]]:
    if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
        return []
    return [(t._version, t.dtype, t.device) for t in tensors]  # a move of a module's counts as no change by itself
