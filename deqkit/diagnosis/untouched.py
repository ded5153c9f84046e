"""L6. A context that leaves everything as it was: generators, modules, buffers, arguments, warnings."""

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


@contextlib.contextmanager
def untouched(modules: dict[str, nn.Module], args: tuple[Any, ...], device: torch.device) -> Iterator[None]:
    """Run what may draw random numbers, change buffers or warn, and leave no trace of it.

    Inside, the generators start from a fixed seed, so that two runs are the same, and warnings are silent.

    Args:
        modules: their buffers and training flags are restored, those of inner modules included.
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
    """What may change in one module when it is called."""

    module: nn.Module
    training: bool
    buffers: dict[str, tuple[Tensor, Tensor] | None]  # each and a copy of it

    @classmethod
    def of(cls, module: nn.Module) -> _Module:
        known = {k: b for k, b in module._buffers.items() if b is None or not is_lazy(b)}
        buffers = {k: None if b is None else (b, b.detach().clone()) for k, b in known.items()}
        return cls(module, module.training, buffers)

    def restore(self) -> None:
        self.module.training = self.training
        for name, kept in self.buffers.items():
            if kept is None:
                self.module._buffers[name] = None
            else:
                buffer, value = kept
                self.module._buffers[name] = buffer
                _write(buffer, value)


def _write(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor its value back if it has lost it; else leave it, for autograd may have saved it."""
    same = tensor.shape == value.shape and bool(((tensor == value) | ((tensor != tensor) & (value != value))).all())
    if not same:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(value)
