"""L0. The transforms of `torch.func` that a solve may run under, one level at a time.

Transforms nest. Each wraps the tensors that it maps or differentiates, so that a tensor of level k holds one of level
k - 1, and at the ground, level 0, lies an ordinary one. A solve looks at the values of residuals, which `vmap` forbids,
and is to leave no trace in any graph; so it runs on the ground, where a mapped dimension is one more batch dimension.
Only for a call of f, which may close over tensors of every level, are the levels entered again.

PyTorch has no public interface to its levels: all that deqkit takes from behind the public one is in this file.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._C._functorch import TransformType
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

_NOTHING = torch.empty(0)  # of the ground, which one made under a transform would not be


def any_running() -> bool:
    """Whether a transform runs now, be it as a part of a graph that is being compiled."""
    return torch._C._are_functorch_transforms_active()


def active() -> bool:
    """Whether operations run above the ground now. A compiler sees one level only: it takes any for the ground."""
    return not torch.compiler.is_compiling() and any_running()


def depth() -> int:
    """The number of the innermost level; 0 at the ground."""
    return _functorch.get_dynamic_layer_stack_depth() if active() else 0


def innermost(tensors: Iterable[Tensor] = ()) -> Level | None:
    """The level that operations on ``tensors`` run at now; None at the ground.

    Raises:
        NotImplementedError: a transform that no solve goes through.
    """
    if torch.compiler.is_compiling():
        return None
    if not any_running():
        return next((_LegacyMapped(x) for x in tensors if _functorch.is_legacy_batchedtensor(x)), None)
    interpreter: Any = retrieve_current_functorch_interpreter()
    kind = interpreter.key().name
    if kind not in _KINDS:
        raise NotImplementedError(f"a solve does not go through the {kind} transform of torch.func")
    return _KINDS[kind](interpreter)


class Level(ABC):
    """One transform, seen from within a solve that began inside it.

    Attributes:
        number: 1 for the outermost transform.
        maps: whether it is `vmap`.
        reverse: whether it records a graph.
        forward: whether it carries tangents.
        mapped: whether a mapped dim has to be moved when tensors go down and up, see `notice`.
        size: of the mapped dim.
    """

    maps = reverse = forward = False
    mapped, size = False, 1

    def __init__(self, interpreter: Any) -> None:
        self.number: int = interpreter.level()
        self._layer: Any = None
        self._left = False
        under = _functorch.get_interpreter_stack()[:-1]
        self._rests_on_vmap = bool(under) and under[-1].key() == TransformType.Vmap
        self._witness_under = _witness(self.number - 1) if under and not self._rests_on_vmap else None

    @contextlib.contextmanager
    def below(self) -> Iterator[None]:
        """Leave this level, the innermost one, for the next below."""
        self._layer = _functorch.pop_dynamic_layer_stack()
        self._left = True
        try:
            with self._modes_below():
                yield
        finally:
            self._left = False
            _functorch.push_dynamic_layer_stack(self._layer)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Enter this level again from the next below, to evaluate something that is not to be recorded at it.

        Raises:
            RuntimeError: other transforms run now than did when it was left.
        """
        if self.gone:  # its tensors count as what they hold
            yield
            return
        if not self._left and not self._under_is_as_it_was():
            raise RuntimeError(
                "a backward pass has to evaluate f inside the torch.func transforms that the solve ran under, and they "
                "have ended: differentiate within them, by another torch.func.grad, vjp or jvp around them"
            )
        _functorch.push_dynamic_layer_stack(self._layer)
        try:
            yield
        finally:
            _functorch.pop_dynamic_layer_stack()

    def _under_is_as_it_was(self) -> bool:
        """Of a `vmap` further out nobody can tell."""
        if self._rests_on_vmap or _functorch.get_dynamic_layer_stack_depth() != self.number - 1:
            return False
        return self._witness_under is None or not _functorch.is_dead_tensor_wrapper(self._witness_under)

    def _modes_below(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    @property
    def gone(self) -> bool:
        """Whether the transform has ended."""
        return False

    @abstractmethod
    def down(self, x: Tensor) -> Tensor:
        """A tensor of this level as one of the next below; a mapped dimension comes first."""

    @abstractmethod
    def up(self, x: Tensor) -> Tensor:
        """A tensor of the level below as one of this level, without gradient or tangent at it."""

    def notice(self, tensors: Iterable[Tensor]) -> bool:
        """Decide by ``tensors`` whether what comes is mapped, and say so; always False for other levels."""
        return False

    def down_rows(self, x: Tensor, dim: int = 0) -> Tensor:
        """`down` with the mapped dimension and ``dim``, that of the samples, as one."""
        return self.down(x)

    def up_rows(self, x: Tensor, dim: int = 0) -> Tensor:
        """The inverse of `down_rows`."""
        return self.up(x)


class _Mapped(Level):
    """`torch.vmap`. Where nothing in a problem is mapped, it is solved once, for all."""

    maps = True

    def __init__(self, interpreter: Any) -> None:
        super().__init__(interpreter)
        self.size: int = interpreter.batch_size()
        if self.size == 0:
            raise ValueError("a solve under torch.vmap needs a mapped dimension of at least one entry, got 0")
        self.mapped = True

    def notice(self, tensors: Iterable[Tensor]) -> bool:
        self.mapped = any(self._is_mapped(x) for x in tensors)
        return self.mapped

    def _is_mapped(self, x: Tensor) -> bool:
        return _functorch.is_batchedtensor(x) and _functorch.maybe_get_level(x) == self.number

    def down(self, x: Tensor) -> Tensor:
        if self.mapped:
            return _functorch._remove_batch_dim(x, self.number, self.size, 0)
        if self._is_mapped(x):
            raise RuntimeError("f(x) is mapped by torch.vmap, and was not at x0: f must be the same at every call")
        return x

    def up(self, x: Tensor) -> Tensor:
        return _functorch._add_batch_dim(x, 0, self.number) if self.mapped else x

    def down_rows(self, x: Tensor, dim: int = 0) -> Tensor:
        x = self.down(x)
        return x.movedim(0, dim).flatten(dim, dim + 1) if self.mapped else x

    def up_rows(self, x: Tensor, dim: int = 0) -> Tensor:
        return self.up(x.unflatten(dim, (self.size, -1)).movedim(dim, 0) if self.mapped else x)


class _LegacyMapped(_Mapped):
    """The older `vmap` of ``torch.autograd.grad(is_grads_batched=True)``: no level to leave, its tensors alone tell."""

    mapped = True

    def __init__(self, x: Tensor) -> None:
        self.number = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        self.size = torch._remove_batch_dim(x, self.number, 1, 0).shape[0]

    @contextlib.contextmanager
    def below(self) -> Iterator[None]:
        yield

    inside = below

    def notice(self, tensors: Iterable[Tensor]) -> bool:
        return True

    def down(self, x: Tensor) -> Tensor:
        return torch._remove_batch_dim(x, self.number, self.size, 0)

    def up(self, x: Tensor) -> Tensor:
        return torch._add_batch_dim(x, 0, self.number)


class _Differentiated(Level):
    def __init__(self, interpreter: Any) -> None:
        super().__init__(interpreter)
        self._witness = _witness(self.number)

    @property
    def gone(self) -> bool:
        return _functorch.is_dead_tensor_wrapper(self._witness)

    def down(self, x: Tensor) -> Tensor:
        return _functorch._unwrap_for_grad(x, self.number)

    def up(self, x: Tensor) -> Tensor:
        return x if self.gone else _functorch._wrap_for_grad(x, self.number)


class _Reverse(_Differentiated):
    """`torch.func.grad`, `vjp` and `jacrev`."""

    reverse = True

    def __init__(self, interpreter: Any) -> None:
        super().__init__(interpreter)
        self._grad_mode_below: bool = interpreter.prev_grad_mode()

    def _modes_below(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._grad_mode_below else torch.no_grad()


class _Forward(_Differentiated):
    """`torch.func.jvp` and `jacfwd`."""

    forward = True

    def __init__(self, interpreter: Any) -> None:
        super().__init__(interpreter)
        self._forward_mode_below: bool = interpreter.prev_fwd_grad_mode()

    def _modes_below(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._forward_mode_below else forward_ad._set_fwd_grad_enabled(False)


_KINDS: dict[str, type[Level]] = {"Vmap": _Mapped, "Grad": _Reverse, "Jvp": _Forward}


def _witness(number: int) -> Tensor:
    """A tensor that tells whether a level that differentiates is still there."""
    return _functorch._wrap_for_grad(_NOTHING, number)


def carries_tangents() -> bool:
    """Whether tensors may have tangents of forward-mode differentiation, at the level that operations run at now."""
    if forward_ad._current_level < 0:
        return False
    level = innermost()
    return level is None or level.forward


def grounded(x: Tensor) -> Tensor:
    """What lies at the ground of a tensor, cut off from all graphs; mapped dimensions come first."""
    level = innermost()
    if level is None:
        return x.detach()
    level.notice([x])
    lower = level.down(x)
    with level.below():
        return grounded(lower)


def any_maps() -> bool:
    """Whether one of the levels is `vmap`."""
    return active() and any(each.key() == TransformType.Vmap for each in _functorch.get_interpreter_stack())


def holds_mapped(x: Tensor) -> bool:
    """Whether x, or the tensor that it holds at some level, is mapped by `vmap`; its tangents and gradients may be."""
    level = innermost()
    if level is None:
        return False
    if level.notice([x]):
        return True
    lower = level.down(x)
    with level.below():
        return holds_mapped(lower)


def fresh_leaf(x: Tensor) -> Tensor:
    """The same value as a tensor that requires grad at the innermost level, and hangs on nothing there."""
    level = innermost()
    if level is None:
        return x.detach().requires_grad_()
    with enable_inplace_requires_grad(True):
        return level.up(level.down(x)).requires_grad_()


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` with one node in the graph, at the innermost level; those below see through it."""
    if not active():
        return function.apply(*args)
    with enable_single_level_autograd_function():
        return _of_one_level(function).apply(*args)


@functools.cache
def _of_one_level(function: type[torch.autograd.Function]) -> Any:
    own = {name: member for name, member in function.__dict__.items() if name in ("forward", "backward", "cuts")}
    return type(function.__name__, (_SingleLevelFunction,), own)


def level_of(x: Tensor) -> int | None:
    """The number of the level that x belongs to; 0 at the ground, None where that level has ended."""
    return None if _functorch.is_dead_tensor_wrapper(x) else max(0, _functorch.maybe_get_level(x))


def view(x: Tensor) -> Tensor:
    """A new tensor with the memory of x."""
    return x.view_as(x)


def passed_on(x: Tensor, by: Callable[[Tensor], Tensor] = Tensor.clone) -> Tensor:
    """A copy of x, for the forward of a function given to `apply`: at the levels below it keeps its derivatives."""
    if not active():
        return by(x)
    # A custom function has them off while its forward runs.
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return at_next_below(by, x)


def at_next_below(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call f on what x holds, at the level below the innermost one, as a tensor of the innermost level."""
    level = innermost()
    assert level is not None
    level.notice([x])
    lower = level.down(x)
    with level.below():
        lower = f(lower)
    return level.up(lower)
