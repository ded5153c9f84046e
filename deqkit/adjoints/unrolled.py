"""L4. Differentiate through the solver's own steps, as through an ordinary network with shared weights.

Exact for the value that was computed, converged or not; memory grows with the number of steps, unless the evaluations
of f are checkpointed (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils.checkpoint import checkpoint

from deqkit.adjoints.base import Adjoint, Problem
from deqkit.state import Blocks, Evaluator


@dataclass(frozen=True)
class UnrolledAdjoint(Adjoint):
    """Exact gradients of the steps that were taken.

    Args:
        checkpoint: keep only each step's input and evaluate f again in the backward pass.
    """

    name: ClassVar[str] = "unrolled"
    unrolls: ClassVar[bool] = True
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint, bool):
            raise TypeError(f"UnrolledAdjoint: checkpoint must be True or False, got {self.checkpoint!r}")

    def prepare(self, f: Evaluator) -> Evaluator:
        """The map that the loop evaluates: f, or f that recomputes itself in the backward pass."""
        if not self.checkpoint:
            return f
        inner = f.f

        def recomputing(x: Any, *args: Any) -> Any:
            return checkpoint(inner, x, *args, use_reentrant=False) if torch.is_grad_enabled() else inner(x, *args)

        return Evaluator(recomputing, f.layout, f.args)

    def attach(self, problem: Problem, x: Blocks) -> Blocks:
        """``x`` itself: its graph is the solve."""
        return x
