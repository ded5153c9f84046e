"""L6. The modules behind f: which there are, and which of them draw random numbers or let samples meet."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_DEPTH = 5  # of functions, containers and objects that hold one another
_WIDTH = 200  # entries of a container that are looked at


def modules_of(f: Any, args: tuple[Any, ...] = ()) -> dict[str, nn.Module]:
    """The modules that f is, closes over, refers to by a global name, or is given, by the name they have there.

    What f reaches in another way, as through a global list of a list of objects, is not found.
    """
    found: dict[str, nn.Module] = {}
    _search("f" if isinstance(f, nn.Module) else "", f, found, set(), _DEPTH)
    for i, arg in enumerate(args):
        _search(f"args[{i}]", arg, found, set(), _DEPTH)
    return found


def _search(name: str, thing: Any, found: dict[str, nn.Module], seen: set[int], depth: int) -> None:
    if id(thing) in seen or depth < 0 or isinstance(thing, Tensor | types.ModuleType | type):
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Module):
        found.setdefault(name or type(thing).__name__, thing)
        return
    for part, inner in _parts(thing):
        _search(f"{name}.{part}" if name else part, inner, found, seen, depth - 1)


def _parts(thing: Any) -> Iterator[tuple[str, Any]]:
    """What a function, a container or a callable object holds, by name."""
    if isinstance(thing, functools.partial):
        yield from _parts(thing.func) if not isinstance(thing.func, nn.Module) else [("f", thing.func)]
        yield from [(f"args[{i}]", arg) for i, arg in enumerate(thing.args)]
        yield from thing.keywords.items()
    elif isinstance(thing, types.MethodType):
        yield "self", thing.__self__
        yield from _parts(thing.__func__)
    elif isinstance(thing, types.FunctionType):
        if not (thing.__module__ or "").startswith("torch."):
            yield from _names_in(thing)
    elif isinstance(thing, dict):
        yield from [(str(key), value) for key, value in list(thing.items())[:_WIDTH]]
    elif isinstance(thing, list | tuple):
        yield from [(f"[{i}]", value) for i, value in enumerate(thing[:_WIDTH])]
    elif callable(thing) and hasattr(thing, "__dict__"):
        yield from list(vars(thing).items())


def _names_in(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What the code of a function refers to: variables it closes over, its defaults and globals."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable without a value yet
            yield name, cell.cell_contents
    yield from (function.__kwdefaults__ or {}).items()
    yield from [(f"defaults[{i}]", value) for i, value in enumerate(function.__defaults__ or ())]
    for name in sorted(_global_names(function.__code__)):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _global_names(code: types.CodeType) -> set[str]:
    inner = [_global_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


def submodules(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """All modules in ``modules``, inner ones included, each once, by its full name."""
    named: dict[int, tuple[str, nn.Module]] = {}
    for root, module in modules.items():
        for path, inner in module.named_modules():
            named.setdefault(id(inner), (f"{root}.{path}" if path else root, inner))
    return dict(named.values())


def describe(name: str, module: nn.Module) -> str:
    """For example "net.drop (Dropout)"."""
    return f"{name} ({type(module).__name__})"


def drawing_modules(modules: dict[str, nn.Module], call: Callable[[], Any], device: torch.device) -> list[str]:
    """The innermost modules in which random numbers are drawn during one call.

    Args:
        modules: to watch, by name.
        call: calls f.
        device: whose generator to watch, beside that of the CPU.
    """
    before: list[tuple[nn.Module, list[Tensor]]] = []  # a stack of the modules that are being called
    drew: dict[int, bool] = {}  # by module: whether it drew by itself
    names = {id(module): describe(name, module) for name, module in modules.items()}

    def enter(module: nn.Module, args: Any) -> None:
        before.append((module, random_state(device)))

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        while before:
            entered, state = before.pop()
            if entered is module:
                break
        else:
            return
        moved = not all(torch.equal(a, b) for a, b in zip(state, random_state(device), strict=True))
        inside = [drew.get(id(inner), False) for inner in module.modules() if inner is not module]
        drew[id(module)] = drew.get(id(module), False) or (moved and not any(inside))

    with _hooked(modules, enter, leave):
        call()
    return [names[key] for key, did in drew.items() if did]


def meeting_modules(
    modules: dict[str, nn.Module], calls: tuple[Callable[[], Any], Callable[[], Any]], others: Tensor, tolerance: float
) -> list[str]:
    """The module whose output for the samples ``others`` is the first to differ between two calls, if one can be told.

    Args:
        modules: to watch, by name.
        calls: each calls f, with another value of the samples that are not in ``others``.
        others: which rows must stay as they are, bool (B,).
        tolerance: relative change of an output that counts.
    """
    outputs: list[tuple[nn.Module, list[Tensor]]] = []

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        rows = [t.detach()[others] for t in tree_leaves(out) if isinstance(t, Tensor) and t.shape[:1] == others.shape]
        outputs.append((module, rows))

    with _hooked(modules, lambda module, args: None, leave):
        calls[0]()
        first, outputs = outputs, []
        calls[1]()
    names = {id(module): describe(name, module) for name, module in modules.items()}
    for (module, rows), (again, rows_again) in zip(first, outputs, strict=False):
        if module is not again or len(rows) != len(rows_again):
            return []
        pairs = list(zip(rows, rows_again, strict=True))
        if any(bool(((a - b).abs() > tolerance * a.abs().max()).any()) for a, b in pairs if a.is_floating_point()):
            return [names[id(module)]]
    return []


def random_state(device: torch.device) -> list[Tensor]:
    """The states of the default generators of the CPU and of ``device``."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


@contextlib.contextmanager
def _hooked(
    modules: dict[str, nn.Module], enter: Callable[[nn.Module, Any], Any], leave: Callable[[nn.Module, Any, Any], Any]
) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for module in modules.values():
            with contextlib.suppress(RuntimeError, NotImplementedError):  # a scripted module takes no hooks
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()
