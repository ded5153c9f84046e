"""L0. A fixed-point problem as it looks from the level below: see `deqkit.levels`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from deqkit.levels import Level
from deqkit.norms import StateNorm, is_row_wise
from deqkit.state import Blocks, Evaluator, primal


class LoweredEvaluator(Evaluator):
    """An evaluator of the level above as a map between blocks of this level; a mapped dim counts as a batch dim.

    Made, and called, at the level below ``level`` only.

    Args:
        inner: the evaluator; it counts these calls, too.
        level: its level.
        keeps_tangents: see `Evaluator`.
    """

    def __init__(self, inner: Evaluator, level: Level, *, keeps_tangents: bool = False) -> None:
        layout = inner.layout.stacked(level.size) if level.mapped else inner.layout
        super().__init__(inner.f, layout, keeps_tangents=keeps_tangents)
        self.inner, self.level = inner, level
        self.autocast_dtype = inner.autocast_dtype

    def __call__(self, x: Blocks) -> Blocks:
        """The inner evaluator's value, without gradients and tangents of its level."""
        self.num_calls += 1
        with self.level.inside():
            fx = self.inner(tuple(self.level.up_rows(b) for b in x))
            fx = tuple(self.level.down_rows(b) for b in fx)
        return primal(fx) if self.drops_tangents else fx

    @contextlib.contextmanager
    def lowered_to(self, dtype: torch.dtype) -> Iterator[None]:
        """Evaluate f under autocast to ``dtype`` for the time of a block, at its own level."""
        with super().lowered_to(dtype), self.inner.lowered_to(dtype):
            yield


def lowered_norm(norm: StateNorm, level: Level) -> StateNorm:
    """The norm of the level above on blocks of the level below ``level``."""
    if is_row_wise(norm):
        return norm

    def lowered(r: Blocks, fx: Blocks) -> Any:
        with level.inside():
            sizes = norm(*(tuple(level.up_rows(b) for b in blocks) for blocks in (r, fx)))
            return tuple(level.down_rows(size, dim=1) for size in sizes)

    return lowered
