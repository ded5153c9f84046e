"""L0. Norms of a state, one or several numbers per sample.

Every norm answers two questions at once, with numbers of shape (K, B): how large is the residual f(x) - x, and how
large is f(x), against which a relative tolerance is measured. K is how many parts of the state must each meet the
tolerance: 1 for a norm over the whole state, the number of leaves where each counts by itself. They are on the host
where it is free to look at them, else on the device: see `deqkit.arrays`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from deqkit import linalg
from deqkit.arrays import Array
from deqkit.state import Blocks, StateLayout


class StateNorm(Protocol):
    """Residual and scale, each of shape (K, B), from the residual and f(x)."""

    def __call__(self, r: Blocks, fx: Blocks) -> tuple[Array, Array]:
        """Measure one evaluation."""
        ...


def l2(r: Blocks, fx: Blocks) -> tuple[Array, Array]:
    """The Euclidean norm over all leaves of a sample."""
    sizes = linalg.sizes((r, fx))
    return sizes[:1], sizes[1:]


def leaf_max(r: Blocks, fx: Blocks) -> tuple[Array, Array]:
    """Euclidean norms of every leaf by itself; the leaf farthest from its own tolerance decides.

    A flat norm hides an unconverged small leaf behind a large one; this one does not.
    """
    sizes = linalg.row_sizes((*r, *fx))
    return sizes[: len(r)], sizes[len(r) :]


_NORMS: dict[str, StateNorm] = {"l2": l2, "leaf_max": leaf_max}


def is_row_wise(norm: StateNorm) -> bool:
    """Whether the norm is a function of the rows of blocks and of nothing else."""
    return norm in _NORMS.values()


def make_norm(norm: str | Callable[[Any], Tensor] | None, layout: StateLayout) -> StateNorm:
    """The norm that a user's setting stands for.

    Args:
        norm: None or "l2", "leaf_max", or a function from a state pytree to a real tensor of the batch shape.
        layout: the layout of the state.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a function.
    """
    if norm is None:
        return l2
    if isinstance(norm, str):
        if norm not in _NORMS:
            raise ValueError(f"unknown norm {norm!r}: choose one of {sorted(_NORMS)} or pass a function of the state")
        return _NORMS[norm]
    if not callable(norm):
        raise TypeError(f"norm must be None, a name or a function of the state, got {type(norm).__name__}")

    def custom(r: Blocks, fx: Blocks) -> tuple[Tensor, Tensor]:
        sizes = [norm(layout.unpack(blocks)) for blocks in (r, fx)]
        for size in sizes:
            if not isinstance(size, Tensor) or size.shape != layout.batch_shape:
                got = tuple(size.shape) if isinstance(size, Tensor) else type(size).__name__
                raise ValueError(f"norm must return a tensor of the batch shape {tuple(layout.batch_shape)}, got {got}")
            if not size.is_floating_point():
                raise TypeError(f"norm must return real floating numbers, got {size.dtype}")
        wide = linalg.small_dtype(layout.device)
        return sizes[0].reshape(1, -1).to(wide), sizes[1].reshape(1, -1).to(wide)

    return custom
