"""L3. A solver's state that lets go of samples once they have ended, so that what it computes is for the others alone.

Where the samples of a batch need unequal numbers of steps, most of the later ones would else be spent on samples that
rest already. f itself still sees the whole batch.
"""

from __future__ import annotations

import numpy as np

from deqkit.arrays import Array
from deqkit.rows import Rows
from deqkit.solvers.base import Point, SelectableState, SolverState
from deqkit.state import Blocks

_WORTH_IT = 2**14  # numbers in the states let go of; to pick the others out at every step has its price, too


class ShrinkingState:
    """A state, and the samples that it still carries.

    Args:
        state: the solver's, of the whole batch.
    """

    def __init__(self, state: SelectableState) -> None:
        self.state = state
        self.rows: Rows | None = None  # None: all

    @classmethod
    def around(cls, state: SolverState) -> ShrinkingState | None:
        """The state as one that can shrink; None if it cannot."""
        return cls(state) if isinstance(state, SelectableState) else None

    def step(self, point: Point, active: Array) -> Blocks:
        """The next point of the samples in ``active`` (B,), on the host; of the others any."""
        carried, left = len(active) if self.rows is None else len(self.rows), np.count_nonzero(active)
        if 2 * left <= carried and (carried - left) * sum(b.shape[1] for b in point.x) >= _WORTH_IT:
            among = active if self.rows is None else self.rows.of(active)
            self.state.select(Rows(among, point.x[0].device))
            self.rows = Rows(active, point.x[0].device)
        if self.rows is None:
            return self.state.step(point)
        return self.rows.put(self.state.step(point.select(self.rows)), point.x)
