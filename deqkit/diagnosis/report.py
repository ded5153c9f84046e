"""L6. A diagnosis as text: aligned tables, the median and the worst of many samples, at most about 60 lines."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from torch import Tensor

from deqkit.diagnosis.records import AdjointTrial, Check, Diagnosis, SolverTrial, Spectrum
from deqkit.solution import failure_counts

_WIDTH = 110
_UNSURE = 0.05  # of the radius, by which it may be off unsaid
_MARKS = {"passed": "ok", "failed": "FAILED", "noted": "note", "skipped": "-"}


def write(d: Diagnosis) -> str:
    """The diagnosis as text."""
    lines = [f"Diagnosis of {d.subject}: {d.state}; rtol={d.rtol:g}, max_steps={d.max_steps}", ""]
    lines += _checks(d.checks)
    if d.solvers:
        lines += ["", *_solvers("solvers", d.solvers)]
    if d.variations:
        lines += ["", *_solvers("without what ails f", d.variations)]
    if d.spectrum is not None:
        lines += ["", *_spectrum(d.spectrum)]
    if d.adjoints:
        lines += ["", *_adjoints(d.adjoints)]
    lines += ["", *[line for note in d.notes for line in _wrapped(note, "")]] if d.notes else []
    lines += ["", "what follows", *[line for text in d.recommendations for line in _wrapped(text, "  * ")]]
    cost = f"f called {d.num_fn_evals:,} times and differentiated {d.num_products:,} times, in {_time(d.seconds)}"
    return "\n".join([*lines, "", f"cost: {cost}"])


def _checks(checks: Sequence[Check]) -> list[str]:
    width = max(len(c.name) for c in checks)
    lines = ["checks"]
    because: dict[str, list[str]] = {}  # those that another one stands in the way of, on a line together
    for c in checks:
        if c.verdict == "skipped" and c.finding.startswith("see "):
            because.setdefault(c.finding, []).append(c.name)
        else:
            lines += _wrapped(c.finding, f"  {_MARKS[c.verdict]:6}  {c.name:{width}}  ")
    for reason, names in because.items():
        lines += _wrapped(f"not checked, {reason}: {', '.join(names)}", f"  {_MARKS['skipped']:6}  ")
    return lines


def _solvers(title: str, trials: Sequence[SolverTrial]) -> list[str]:
    head = ["converged", "steps", "calls of f", "residual", "worst", "worst error", "time", ""]
    return _table(title, head, [[t.name, *_solver_row(t)] for t in trials])


def _solver_row(t: SolverTrial) -> list[str]:
    if t.status is None:
        return ["-", "-", str(t.num_fn_evals), "-", "-", "-", _time(t.seconds), t.exception]
    assert t.num_steps is not None and t.relative_residual is not None
    share = f"{t.num_converged}/{t.status.numel()}"
    median, worst = _middle_and_worst(t.relative_residual)
    error = "-" if t.error is None else _middle_and_worst(t.error)[1]
    failures = failure_counts(t.status)
    return [share, _span(t.num_steps), str(t.num_fn_evals), median, worst, error, _time(t.seconds), failures]


def _spectrum(s: Spectrum) -> list[str]:
    where = "of the batch as one system" if s.one_system else "per sample"
    settled = s.settled is not None and bool(s.settled.any())
    title = f"df/dx at the {'fixed point' if settled else 'best point found'}, {where}"
    rows = []
    for name, values in (("spectral radius", s.radius), ("spectral norm", s.norm)):
        kept = s.of_interest(values)
        if kept is not None:
            rows.append([name, f"{float(kept.median()):.3g}", f"{float(kept.max()):.3g}"])
    lines = _table(title, ["median", "worst"], rows) if rows else [f"{title}: {s.note or 'not finite'}"]
    radii, errors = s.of_interest(s.radius), s.of_interest(s.radius_error)
    if radii is not None and errors is not None and float(errors.max()) > _UNSURE * float(radii.max()):
        text = f"the radius is known to about {float(errors.max()):.1e} only: the Jacobian is far from normal"
        lines += _wrapped(text, "  ")
    return lines + (_wrapped(s.note, "  ") if s.note and rows else [])


def _adjoints(trials: Sequence[AdjointTrial]) -> list[str]:
    head = ["cosine", "error", "products", "time", ""]
    return _table("adjoints", head, [[t.name, *_adjoint_row(t)] for t in trials])


def _adjoint_row(t: AdjointTrial) -> list[str]:
    if t.cosine is None or t.relative_error is None:
        return ["-", "-", "-", "-", t.exception]
    products = "-" if t.num_products is None else str(t.num_products)
    through = f"through {t.through}" if t.through else ""
    return [f"{t.cosine:.4f}", f"{t.relative_error:.1e}", products, _time(t.seconds), through]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns; the first and the last to the left, the others to the right."""
    rows = [[f"  {row[0]}", *row[1:]] for row in rows]
    everything = [[title, *head], *rows]
    widths = [max(len(row[i]) for row in everything) for i in range(len(head) + 1)]
    lines = []
    for row in everything:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        if not head[-1]:
            cells[-1] = row[-1]
        line = "  ".join(cells).rstrip()
        lines.append(line if len(line) <= _WIDTH + 30 else line[: _WIDTH + 27] + "...")
    return lines


def _wrapped(text: str, first: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_long_words=False)


def _middle_and_worst(values: Tensor) -> tuple[str, str]:
    """The median of the finite ones, and the largest of all."""
    flat = values.reshape(-1).double()
    finite = flat[flat.isfinite()]
    if not len(finite):
        return "-", "-" if bool(flat.isnan().all()) else "inf"
    return f"{float(finite.median()):.1e}", f"{float(finite.max()):.1e}"


def _span(steps: Tensor) -> str:
    low, high = int(steps.min()), int(steps.max())
    return str(low) if low == high else f"{low}-{high}"


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
