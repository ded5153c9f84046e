"""What a sweep of `detector_steps` says: the table, and how many steps are enough, in words."""

from __future__ import annotations

from collections.abc import Sequence

from detector_steps import AT_REST, OWN, DetectorRow
from reporting import format_table
from torch import Tensor

TOLERATED_LOSS = 0.001  # of AP on the scale 0..1: a tenth of a point
TABLE_STEPS = (0, 1, 2, 3, 4, 5, 7, 10, 15, 20)
PAPER = (7, 15)  # steps at test and in training


def ap_at_rest(rows: Sequence[DetectorRow]) -> float | None:
    """AP with the pyramid at rest; None where the set has no objects."""
    return next(row.ap for row in rows if row.solver == AT_REST)


def rows_of(rows: Sequence[DetectorRow], label: str) -> list[DetectorRow]:
    """Those of one solver, by rising number of steps."""
    return [row for row in rows if row.solver == label]


def solvers_of(rows: Sequence[DetectorRow]) -> list[str]:
    """The labels of the solvers."""
    return list(dict.fromkeys(row.solver for row in rows if row.steps is not None))


def fewest_steps(rows: Sequence[DetectorRow], label: str) -> DetectorRow | None:
    """The row of the fewest steps from which on AP stays within `TOLERATED_LOSS` of that at rest, or None."""
    rest, enough = ap_at_rest(rows), None
    for row in reversed(rows_of(rows, label)):
        if not rest or row.ap is None or abs(row.ap - rest) > TOLERATED_LOSS + 1e-12:
            break
        enough = row
    return enough


def answer(rows: Sequence[DetectorRow], label: str) -> str:
    """How many steps the neck needs with one solver, in one sentence computed from its rows."""
    rest, mine = ap_at_rest(rows), rows_of(rows, label)
    if rest is None:
        return f"{label}: no AP exists for this set, it has no objects to find"
    if rest == 0:
        return f"{label}: AP is 0 with the pyramid at rest, so it does not say how many steps are needed"
    points, limit, last = f"{100 * rest:.2f}", f"{100 * TOLERATED_LOSS:g} points", mine[-1]
    enough = fewest_steps(rows, label)
    if enough is None:
        return (
            f"{label}: {last.steps} steps are not enough: AP is {100 * (last.ap or 0):.2f} then, more than {limit} "
            f"from the {points} with the pyramid at rest"
        )
    if enough is last and len(mine) > 1:
        start = f"{label}: {last.steps} steps, the most that were tried, are the first to bring AP within {limit} of"
    else:
        start = f"{label}: {_steps(enough.steps)} enough: from there on AP stays within {limit} of"
    error = "" if enough.error_median is None else f", with the pyramid {enough.error_median:.1%} off"
    return f"{start} the {points} that it is with the pyramid at rest ({100 * (enough.ap or 0):.2f}{error})"


def _steps(count: int | None) -> str:
    return "1 step is" if count == 1 else f"{count} steps are"


def beside_the_paper(rows: Sequence[DetectorRow]) -> str | None:
    """AP at the numbers of steps that the paper finds to give the same; None where they were not measured."""
    few, many = ({row.solver: row.ap for row in rows if row.steps == k and row.ap is not None} for k in PAPER)
    both = [f"{label} {100 * few[label]:.2f} and {100 * many[label]:.2f}" for label in few if label in many]
    return (
        f"AP with {PAPER[0]} and {PAPER[1]} steps, the paper's at test and in training: {'; '.join(both)}"
        if both
        else None
    )


def contraction(radii: Tensor) -> str:
    """The spectral radii of dG/dP in words."""
    return (
        f"Spectral radius of dG/dP at rest, {len(radii)} images: {radii.min():.2f} to {radii.max():.2f}. "
        "Near rest a plain step shrinks an error to this fraction of itself."
    )


def not_at_rest(rows: Sequence[DetectorRow]) -> str | None:
    """A warning where the reference is none, for the errors are measured from it."""
    residual = next(row.residual_worst for row in rows if row.solver == AT_REST)
    if residual is not None and residual <= 1e-7:
        return None
    return (
        f"the pyramids at rest could not be found to 1e-7 (worst residual {residual:.1e}): errors below that, and the "
        "AP at rest, are those of the best pyramids found"
    )


def detector_table(rows: Sequence[DetectorRow]) -> str:
    """The rows for the terminal; AP in points, as in the literature."""
    header = ["solver", "steps", "AP", "AP50", "residual, median", "worst", "error, median", "worst", "ms per image"]
    lines = []
    for label in (AT_REST, OWN, *solvers_of(rows)):
        mine = rows_of(rows, label)
        shown = [row for row in mine if row.steps is None or row.steps in TABLE_STEPS or row is mine[-1]]
        lines += [_line(row, row is mine[0]) for row in shown]
    return format_table(header, lines)


def _line(row: DetectorRow, is_first: bool) -> list[str]:
    steps = f"{row.mean_steps:.1f}" if row.steps is None else str(row.steps)
    aps = ["n/a" if ap is None else f"{100 * ap:.2f}" for ap in (row.ap, row.ap50)]
    sizes = (row.residual_median, row.residual_worst, row.error_median, row.error_worst)
    milliseconds = "-" if row.seconds_per_image is None else f"{1e3 * row.seconds_per_image:.1f}"
    return [
        row.solver if is_first else "", steps, *aps, *("-" if n is None else f"{n:.1e}" for n in sizes), milliseconds,
    ]  # fmt: skip
