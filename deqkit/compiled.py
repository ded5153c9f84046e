"""L0. Compiled functions whose graph is walked more than once.

The backward pass that `torch.compile` makes may write over what the forward pass has saved for it ("donated buffers"),
and refuses to run where the graph is to be kept. Products with df/dx are taken along one graph again and again. So
what is compiled while f is evaluated with gradients is compiled without donated buffers.

To have none is noted as None there, which PyTorch (2.11 to 2.15) takes for some where the shapes are dynamic, as they
are from the second size of an input on; [] it takes for none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

try:
    from torch._functorch import config
except ImportError:
    config = None

# It promises nobody to be there. Without it compiled functions are as PyTorch makes them, and all others as they were.
_IS_KNOWN = hasattr(config, "donated_buffer")


def graphs_to_keep() -> contextlib.AbstractContextManager[None]:
    """A block in which what is compiled lets its graphs be kept."""
    if not (_IS_KNOWN and torch.is_grad_enabled()) or torch.compiler.is_compiling():  # on the way of every evaluation
        return contextlib.nullcontext()
    return _without_donated_buffers()


@contextlib.contextmanager
def _without_donated_buffers() -> Iterator[None]:
    assert config is not None
    before = config.donated_buffer
    config.donated_buffer = False
    try:
        yield
    finally:
        config.donated_buffer = before


def is_refusal(error: RuntimeError) -> bool:
    """Whether a compiled backward pass did not run because the graph is to be kept."""
    return "donated buffers" in str(error)


def let_be_kept(outputs: Iterable[Tensor]) -> bool:
    """Let the compiled parts of the graphs of ``outputs`` run that were compiled to be kept.

    Returns:
        Whether there was one that would not have run.
    """
    found, seen, todo = False, set(), [t.grad_fn for t in outputs]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo.extend(following for following, _ in node.next_functions)
        metadata = getattr(getattr(node, "_forward_cls", None), "metadata", None)
        if metadata is not None and getattr(metadata, "bw_donated_idxs", ()) is None:
            metadata.bw_donated_idxs, found = [], True
    return found
