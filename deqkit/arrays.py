"""L0. Numbers per sample, kept on the host or on the device.

What a solve remembers of a sample is a handful of numbers. Where the host looks at the residuals after every step, it
keeps the books itself, in NumPy, at a fraction of a microsecond per operation; tensors would cost several each, and on
a GPU a kernel each. Where it must not look (a fixed number of steps on a GPU, looks far between, a graph being traced)
the same books are kept in tensors. Both understand the same operators; what they do not share is here.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = Any  # np.ndarray or Tensor


def may_look(device: torch.device) -> bool:
    """Whether the host can see values: not while a graph is traced, nor captured."""
    if torch.compiler.is_compiling():
        return False
    return not is_capturing(device)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which nobody may look at values."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def free_to_look(device: torch.device) -> bool:
    """Whether it can at no cost."""
    return device.type == "cpu" and may_look(device)


def quiet() -> contextlib.AbstractContextManager[Any]:
    """A context in which NumPy, like a tensor, says nothing of infinities and NaN."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else np.errstate(all="ignore")


def to_host(values: Tensor) -> np.ndarray:
    """The values, at the price of one synchronisation with the device."""
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore # wrapped, without a buffer to share
        return np.array(values.tolist()).reshape(values.shape)
    return (values.detach() if values.requires_grad else values).cpu().numpy()


def on_host(values: Array) -> np.ndarray:
    """The values, wherever they are kept."""
    return to_host(values) if isinstance(values, Tensor) else values


def as_tensor(values: Array, like: Tensor) -> Tensor:
    """The values as a tensor on the device of ``like``."""
    if isinstance(values, Tensor):
        return values
    tensor = torch.from_numpy(values)
    return tensor if like.device.type == "cpu" else tensor.to(like.device)


def known_none(mask: Array) -> bool:
    """Whether the mask holds nowhere, as far as the host can tell without looking at the device."""
    return isinstance(mask, np.ndarray) and not np.count_nonzero(mask)


def known_all(mask: Array) -> bool:
    """Whether the mask holds everywhere, as far as the host can tell without looking at the device."""
    return isinstance(mask, np.ndarray) and np.count_nonzero(mask) == mask.size


def where(mask: Array, a: Any, b: Any) -> Array:
    """Elements of ``a`` where the mask holds, of ``b`` elsewhere."""
    return torch.where(mask, a, b) if isinstance(mask, Tensor) else np.where(mask, a, b)


def zeros(like: Array, *shape: int) -> Array:
    """Zeros of the dtype and in the place of ``like``."""
    return like.new_zeros(shape) if isinstance(like, Tensor) else np.zeros(shape, like.dtype)


def placed(values: Array, like: Array) -> Array:
    """The values in the place of ``like``."""
    return as_tensor(values, like) if isinstance(like, Tensor) else on_host(values)


def with_column(matrix: Array, column: Array) -> Array:
    """The matrix (B, n) and one more column (B,)."""
    parts = [matrix, column[:, None]]
    return torch.cat(parts, dim=1) if isinstance(matrix, Tensor) else np.concatenate(parts, axis=1)


def copy(values: Array) -> Array:
    """The values, to be kept when these are written to."""
    return values.clone() if isinstance(values, Tensor) else values.copy()


def matmul(a: Array, b: Array) -> Array:
    """Products of batches of matrices; of small ones, several times quicker on the host in NumPy than as tensors."""
    return torch.bmm(a, b) if isinstance(a, Tensor) else np.matmul(a, b)


def rows_dot(a: Array, b: Array) -> Array:
    """Inner product of every row (B, n) with the other's, (B,)."""
    return torch.linalg.vecdot(a, b) if isinstance(a, Tensor) else np.einsum("bn,bn->b", a, b)


def at_least(values: Array, low: float) -> Array:
    """The values, none of them below ``low``; NaN stays."""
    return values.clamp(min=low) if isinstance(values, Tensor) else np.maximum(values, low)


def log(values: Array) -> Array:
    """Natural logarithm."""
    return values.log() if isinstance(values, Tensor) else np.log(values)


def indices(values: Array) -> Array:
    """0, 1, ... for a vector."""
    count = values.shape[0]  # len() would fix the batch size of an exported program
    return torch.arange(count, device=values.device) if isinstance(values, Tensor) else np.arange(count)
