"""L0. Norms of a whole state, one number per sample.

Every norm answers two questions at once, with tensors of shape (B,): how large is the residual f(x) - x, and how large
is f(x), against which a relative tolerance is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from deqkit.state import Blocks, StateLayout


class StateNorm(Protocol):
    """Residual and scale, each of shape (B,), from the residual and f(x)."""

    def __call__(self, r: Blocks, fx: Blocks) -> tuple[Tensor, Tensor]:
        """Measure one evaluation."""
        ...


def leaf_norms(blocks: Blocks) -> Tensor:
    """Euclidean norm per leaf and sample, shape (number of leaves, B)."""
    return torch.stack([torch.linalg.vector_norm(b, dim=1) for b in blocks])


def l2(r: Blocks, fx: Blocks) -> tuple[Tensor, Tensor]:
    """The Euclidean norm over all leaves of a sample."""
    if len(r) == 1:
        return torch.linalg.vector_norm(r[0], dim=1), torch.linalg.vector_norm(fx[0], dim=1)
    return torch.linalg.vector_norm(leaf_norms(r), dim=0), torch.linalg.vector_norm(leaf_norms(fx), dim=0)


def leaf_max(r: Blocks, fx: Blocks) -> tuple[Tensor, Tensor]:
    """Euclidean norms of the leaf whose residual is worst relative to its own size.

    A flat norm hides an unconverged small leaf behind a large one; this one does not.
    """
    residuals, scales = leaf_norms(r), leaf_norms(fx)
    # A NaN leaf counts as worst, so that it cannot hide either.
    badness = torch.where(residuals == 0, 0.0, residuals / scales).nan_to_num(nan=torch.inf)
    worst = badness.argmax(dim=0, keepdim=True)
    return residuals.gather(0, worst).squeeze(0), scales.gather(0, worst).squeeze(0)


_NORMS: dict[str, StateNorm] = {"l2": l2, "leaf_max": leaf_max}


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
        return sizes[0].reshape(-1), sizes[1].reshape(-1)

    return custom
