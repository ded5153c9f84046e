"""L3. A solve that lets go of samples once they have ended, so that what it computes is for the others alone.

Where the samples of a batch need unequal numbers of steps, most of the later ones would else be spent on samples that
rest already. The solver's own arithmetic always shrinks. f sees the whole batch, unless the caller has said what in its
arguments belongs to the samples.
"""

from __future__ import annotations

import numpy as np

from deqkit.arrays import Array
from deqkit.rows import Rows
from deqkit.solvers.base import Point, SelectableState, SolverState
from deqkit.state import Blocks, Evaluator

_FEW_ENOUGH = 0.75  # so that a history is not copied for every sample that ends
_WORTH_IT = 2**14  # numbers in the states let go of; to pick the others out at every step has its price, too


class ShrinkingSolve:
    """The map and the solver's state, and the samples that they still carry.

    Args:
        f: of the whole batch.
        state: the solver's, of the whole batch.
    """

    def __init__(self, f: Evaluator, state: SolverState) -> None:
        self.f, self.state = f, state
        self.selectable = state if isinstance(state, SelectableState) else None
        self.narrow_f: Evaluator | None = None
        self.rows: Rows | None = None  # None: all

    def let_go(self, active: Array) -> None:
        """Go on with the samples in ``active`` (B,), on the host, if enough of those carried have ended."""
        if self.selectable is None and self.f.sample_args is None:
            return
        carried, left = len(active) if self.rows is None else len(self.rows), int(np.count_nonzero(active))
        width = sum(leaf.width for leaf in self.f.layout.leaves)
        worth_it = self.f.sample_args is not None or (carried - left) * width >= _WORTH_IT
        if not (worth_it and 0 < left <= _FEW_ENOUGH * carried):
            return
        device = self.f.layout.device
        if self.selectable is not None:
            self.selectable.select(Rows(active if self.rows is None else self.rows.of(active), device))
        self.rows = Rows(active, device)
        if self.f.sample_args is not None:
            self.narrow_f = self.f.narrowed(self.rows.on_device)

    def evaluate(self, x: Blocks) -> Blocks:
        """f(x) of the samples carried; of the others that or x."""
        if self.narrow_f is None or self.rows is None:
            return self.f(x)
        self.f.num_calls += 1
        try:
            fx = self.narrow_f(self.rows.of_blocks(x))
        except Exception as error:
            error.add_note(
                f"f was called on {len(self.rows)} of {self.f.layout.num_samples} samples, as sample_args allows: it "
                "must name every argument that belongs to samples, and f must not close over any"
            )
            raise
        return self.rows.put(fx, x)

    def step(self, point: Point) -> Blocks:
        """The next point of the samples carried; of the others any."""
        if self.rows is None or self.selectable is None:
            return self.state.step(point)
        return self.rows.put(self.state.step(point.select(self.rows)), point.x)
