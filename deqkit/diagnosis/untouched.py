"""L6. A context that leaves everything as it was: generators, modules, what they hold, arguments, warnings."""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

_SEED = 0
_TENSORS = ("_parameters", "_buffers")


@contextlib.contextmanager
def untouched(modules: dict[str, nn.Module], args: tuple[Any, ...], device: torch.device) -> Iterator[None]:
    """Run what may draw random numbers, change buffers or warn, and leave no trace of it.

    Inside, the generators start from a fixed seed, so that two runs are the same, and warnings are silent.

    Args:
        modules: their parameters, buffers, training flags and other attributes are restored, those of inner modules
            included. What an attribute refers to is not copied: a list that f appends to stays longer.
        args: tensors in it get their values back.
        device: whose generator is restored, beside that of the CPU, of Python and of numpy.
    """
    kept = [_Module.of(inner) for module in modules.values() for inner in module.modules()]
    tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.layout == torch.strided]
    values = [(t, t.detach().clone()) for t in tensors]
    accelerators = [] if device.type == "cpu" else [device]
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        kind = "cuda" if device.type == "cpu" else device.type
        stack.enter_context(torch.random.fork_rng(accelerators, device_type=kind))
        seed(device)
        try:
            yield
        finally:
            for module in kept:
                module.restore()
            for tensor, value in values:
                _write(tensor, value)
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


def seed(device: torch.device) -> None:
    """Start all generators that f may draw from anew, at the same place each time."""
    torch.default_generator.manual_seed(_SEED)
    if device.type != "cpu":
        with torch.get_device_module(device).device(device):
            torch.get_device_module(device).manual_seed(_SEED)
    random.seed(_SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(_SEED)


@dataclass
class _Module:
    """What may change in one module when it is called.

    Attributes:
        module: the module.
        training: its mode.
        tensors: its parameters and buffers, by group and name; with a copy of those that have a value.
        attributes: everything else that it has; None where that is not to be restored, as for a module that f
            initialises (lazy ones).
    """

    module: nn.Module
    training: bool
    tensors: dict[str, dict[str, tuple[Tensor | None, Tensor | None]]]
    attributes: dict[str, Any] | None

    @classmethod
    def of(cls, module: nn.Module) -> _Module:
        groups = {group: dict(getattr(module, group).items()) for group in _TENSORS}
        has_lazy = any(is_lazy(t) for group in groups.values() for t in group.values())
        fixed = has_lazy or isinstance(module, torch.jit.ScriptModule)
        tensors = {group: {name: (t, _copy(t)) for name, t in held.items()} for group, held in groups.items()}
        attributes = None if fixed else {k: v for k, v in vars(module).items() if k not in _TENSORS}
        return cls(module, module.training, tensors, attributes)

    def restore(self) -> None:
        self.module.training = self.training
        for group, kept in self.tensors.items():
            present = getattr(self.module, group)
            for name in [name for name in present.keys() if name not in kept]:  # noqa: SIM118, that of a scripted one
                del present[name]
            for name, (tensor, value) in kept.items():
                if tensor is None or value is not None:
                    present[name] = tensor
                if tensor is not None and value is not None:
                    _write(tensor, value)
        if self.attributes is not None:
            own = vars(self.module)
            for name in [name for name in own if name not in self.attributes and name not in _TENSORS]:
                del own[name]
            own.update(self.attributes)


def _copy(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided:
        return None
    return tensor.detach().clone()


def _write(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor its value back if it has lost it; else leave it, for autograd may have saved it."""
    same = tensor.shape == value.shape and bool(((tensor == value) | ((tensor != tensor) & (value != value))).all())
    if not same:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(value)
