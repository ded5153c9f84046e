"""What deqkit is to reach beside the other libraries, and whether it does: ratios of figures of one run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peer_solves import SolveRow

DEFAULT = "anderson"  # deqkit's solver where none is named
MIXED = ("mixed_batch", "float32", 1e-4)
FINE = ("float32", 1e-5)
OVERHEADS = (  # time / (calls x bare f), at most
    ("tanh_easy", {"fixed_point": 1.15, "anderson": 1.4, "broyden": 1.8}),
    ("tanh_hard", {"fixed_point": 1.15, "anderson": 1.4, "broyden": 1.8}),
    ("conv", {"fixed_point": 1.08, "anderson": 1.2, "broyden": 1.4}),
    ("ifpn_wide", {"fixed_point": 1.03, "anderson": 1.03, "broyden": 1.03}),
)


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        what: the figure, and of what.
        goal: the most that it may be.
        figure: what it is; NaN where it has not been measured, infinity where deqkit alone did not solve the problem.
        note: where the worst is, and what could not be compared.
        met: whether it is small enough; None where it has not been measured.
    """

    what: str
    goal: float
    figure: float
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the figure is small enough."""
        return None if math.isnan(self.figure) else self.figure <= self.goal

    def cells(self) -> list[str]:
        """The line in words."""
        figure = "-" if math.isnan(self.figure) else f"{self.figure:.2f}"
        return [self.what, f"{self.goal:g}", figure, {True: "met", False: "missed", None: "not measured"}[self.met],
                self.note]  # fmt: skip


def targets(rows: Sequence[SolveRow]) -> list[Target]:
    """All of them, from the solves of one run; what has not been measured is said so."""
    lines = [
        Target(f"time / bare calls, {problem}, {solver}", goal, _overhead(rows, problem, solver))
        for problem, goals in OVERHEADS
        for solver, goal in goals.items()
    ]
    fine = [row for row in rows if (row.dtype, row.rtol) == FINE]
    for ours, solvers in (("default solver", (DEFAULT,)), ("best solver", None)):
        calls = against(fine, lambda row: row.calls, solvers, None)
        lines += _worst_and_mean(f"calls to {FINE[1]:g}, {ours} / best other", calls, 1.0, 0.7)
        seconds = against(fine, lambda row: row.seconds, solvers, "torchdeq")
        lines += _worst_and_mean(f"time to {FINE[1]:g}, {ours} / torchdeq's best", seconds, 1.0, 0.5)
        mixed = [row for row in rows if (row.problem, row.dtype, row.rtol) == MIXED]
        ratio = against(mixed, lambda row: row.seconds, solvers, "torchdeq").get(MIXED[0], math.nan)
        lines.append(Target(f"time to {MIXED[2]:g}, {MIXED[0]}, {ours} / torchdeq's best", 0.3, ratio))
    return lines


def against(
    rows: Sequence[SolveRow], value: Callable[[SolveRow], float], ours: Sequence[str] | None, library: str | None
) -> dict[str, float]:
    """The best figure of deqkit over the best of others, per problem.

    Args:
        rows: of one tolerance.
        value: the figure; rows in which it is not a number are left out.
        ours: the solvers of deqkit that stand for it; None for all.
        library: the other one; None for all.

    Returns:
        The ratio for each problem that deqkit or another has solved: 0 where only deqkit has, infinity where only
        another has.
    """
    ratios = {}
    for problem in dict.fromkeys(row.problem for row in rows):
        measured = [row for row in rows if row.problem == problem]
        solved = [row for row in measured if row.solved and not math.isnan(value(row))]
        own = [value(row) for row in solved if row.library == "deqkit" and (ours is None or row.solver in ours)]
        theirs = [value(row) for row in solved if row.library != "deqkit" and library in (None, row.library)]
        compared = any(row.library != "deqkit" and library in (None, row.library) for row in measured)
        if compared and (own or theirs):
            ratios[problem] = math.inf if not own else min(own) / min(theirs) if theirs else 0.0
    return ratios


def _overhead(rows: Sequence[SolveRow], problem: str, solver: str) -> float:
    found = [
        row.ratio for row in rows
        if (row.problem, row.library, row.solver, row.dtype, row.rtol) == (problem, "deqkit", solver, *FINE)
    ]  # fmt: skip
    return found[0] if found else math.nan


def _worst_and_mean(what: str, ratios: dict[str, float], worst_goal: float, mean_goal: float) -> list[Target]:
    if not ratios:
        return [Target(f"{what}, worst", worst_goal, math.nan), Target(f"{what}, mean", mean_goal, math.nan)]
    worst = max(ratios, key=lambda problem: ratios[problem])
    both = [ratio for ratio in ratios.values() if 0 < ratio < math.inf]
    alone = [problem for problem, ratio in ratios.items() if ratio == 0]
    lost = [problem for problem, ratio in ratios.items() if ratio == math.inf]
    notes = [f"geometric mean of {len(both)} problems that both solve"]
    notes += [f"solved by deqkit alone: {', '.join(alone)}"] if alone else []
    notes += [f"solved by the other alone: {', '.join(lost)}"] if lost else []
    mean = math.inf if lost else statistics.geometric_mean(both) if both else math.nan
    return [
        Target(f"{what}, worst", worst_goal, ratios[worst], worst),
        Target(f"{what}, mean", mean_goal, mean, "; ".join(notes)),
    ]
