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

    A sample that has left the finite numbers makes the gradients of parameters that it shares with others non-finite,
    as it would in any unrolled network.

    Args:
        checkpoint: keep only each step's input and evaluate f again in the backward pass. `Solution.num_fn_evals` does
            not count those evaluations.
    """

    name: ClassVar[str] = "unrolled"
    unrolls: ClassVar[bool] = True
    has_levels: ClassVar[bool] = True
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint, bool):
            raise TypeError(f"UnrolledAdjoint: checkpoint must be True or False, got {self.checkpoint!r}")

    @property
    def traceable(self) -> bool:
        """Always."""
        return True

    def prepare(self, f: Evaluator) -> Evaluator:
        """The map that the loop evaluates: f, or f that recomputes itself in the backward pass."""
        inner = f.f

        def recomputing(x: Any, *args: Any) -> Any:
            return checkpoint(inner, x, *args, use_reentrant=False) if torch.is_grad_enabled() else inner(x, *args)

        # All steps lie in one graph, which need not hold a cast of the same parameter for each of them.
        return Evaluator(
            recomputing if self.checkpoint else inner, f.layout, f.args, shares_casts=True, keeps_tangents=True
        )

    def attach(self, problem: Problem, x: Blocks) -> Blocks:
        """``x`` itself: its graph is the solve."""
        return x
