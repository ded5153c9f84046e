"""Tables, verdicts and figure of train_cost.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from plots import COLOURS
from reporting import format_table

if TYPE_CHECKING:
    from train_cost import Row, StepRow

TRAINING = {"fast": 1.5, "paper": 3.3}  # most of the explicit FPN's seconds
INFERENCE = {"paper": 1.6, "fast": 1.6}
MEMORY = 1.2
FLAT = 1.01  # most memory over the memory at half as many steps: a history is full by then


def groups(rows: Sequence[Any]) -> dict[tuple[str, int, str], list[Any]]:
    """Rows by detector, size and device, in their order."""
    found: dict[tuple[str, int, str], list[Any]] = {}
    for row in rows:
        found.setdefault((row.detector, row.image_size, row.device), []).append(row)
    return found


def cost_tables(rows: Sequence[Row]) -> list[str]:
    """Two tables per detector, size and device: what it costs, and what G was called for."""
    tables = []
    for (detector, size, device), mine in groups(rows).items():
        title = f"{detector}, {mine[0].backbone}, {size} px, {mine[0].images} per batch, {device}, {_how(mine[0])}"
        tables.append(f"{title} (x: over the explicit FPN)\n{_cost_table(mine)}")
        tables.append(f"Calls of G per batch (the implicit necks of {title})\n{_calls_table(mine)}")
    return tables


def _how(row: Row) -> str:
    return f"{row.weights}, {row.setting}" if row.setting else row.weights


def _cost_table(rows: Sequence[Row]) -> str:
    header = [
        "neck", "s/step", "x", "CPU x", "neck's share", "MACs x", "at 800x1344", "s/inference", "x", "CPU x",
        "neck's share", "MACs x", "GiB, step", "x", "GiB, inference", "GiB, process",
    ]  # fmt: skip
    lines = []
    for row in rows:
        process = "-" if row.process_memory is None else f"{row.process_memory / 2**30:.2f}"
        lines.append([
            row.neck,
            f"{row.train_seconds:.3g}", f"{row.train_ratio:.2f}", _known(row.train_processor_ratio, ".2f"),
            f"{row.train_neck_share:.0%}", f"{row.train_mac_ratio:.2f}", _known(row.full_mac_ratio, ".2f"),
            f"{row.infer_seconds:.3g}", f"{row.infer_ratio:.2f}", _known(row.infer_processor_ratio, ".2f"),
            f"{row.infer_neck_share:.0%}", f"{row.infer_mac_ratio:.2f}",
            f"{row.train_memory / 2**30:.3f}", f"{row.memory_ratio:.2f}", f"{row.infer_memory / 2**30:.3f}", process,
        ])  # fmt: skip
    return format_table(header, lines)


def _calls_table(rows: Sequence[Row]) -> str:
    header = [
        "neck", "steps", "converged", "evaluations", "adjoint steps", "converged", "products", "for weights", "in all",
        "inference: steps", "converged", "evaluations",
    ]  # fmt: skip
    lines = []
    for row in rows:
        if row.forward_calls:
            lines.append([
                row.neck, _known(row.steps, ".1f"), _known(row.converged, ".0%"), str(row.forward_calls),
                _known(row.adjoint_steps, ".1f"), _known(row.adjoint_converged, ".0%"), str(row.backward_calls),
                str(row.weight_calls), str(row.equivalents), _known(row.infer_steps, ".1f"),
                _known(row.infer_converged, ".0%"), str(row.infer_calls),
            ])  # fmt: skip
    return format_table(header, lines)


def _known(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def memory_table(rows: Sequence[StepRow]) -> str:
    """A line per neck, a column per number of steps."""
    steps = sorted({row.steps for row in rows})
    lines = []
    for (_, _, device), mine in groups(rows).items():
        for neck in dict.fromkeys(row.neck for row in mine):
            by_steps = {row.steps: row for row in mine if row.neck == neck}
            cells = [f"{by_steps[k].train_memory / 2**30:.3f} ({by_steps[k].memory_ratio:.2f})" for k in steps]
            lines.append([f"{_stepped(neck)}, {device}", *cells])
    return format_table(["steps", *map(str, steps)], lines)


def _stepped(neck: str) -> str:
    return {"unroll-2": "unroll"}.get(neck, neck)


def verdicts(rows: Sequence[Row], by_steps: Sequence[StepRow]) -> list[str]:
    """The targets of time and memory, met or not with the figure; they are those of RetinaNet with ResNet-50."""
    lines = []
    for (detector, size, device), mine in groups(rows).items():
        named = {row.neck: row for row in mine}
        aimed = (detector, mine[0].backbone) == ("retinanet", "resnet50")
        head = f"{detector}, {size} px, {device}, {_how(mine[0])}: "
        for neck, target in TRAINING.items():
            if neck in named:
                row = named[neck]
                full = "" if math.isnan(row.full_mac_ratio) else f", {row.full_mac_ratio:.2f} at 800x1344"
                aside = (
                    f"processor time {_known(row.train_processor_ratio, '.2f')}, MACs {row.train_mac_ratio:.2f}{full}"
                )
                lines.append(f"{head}training step, {neck} / FPN: {_met(row.train_ratio, target, aimed)}; {aside}")
        for neck, target in INFERENCE.items():
            if neck in named:
                row = named[neck]
                what = f"i-FPN inference / explicit, {neck}, {row.infer_steps:.1f} steps"
                aside = f"processor time {_known(row.infer_processor_ratio, '.2f')}, MACs {row.infer_mac_ratio:.2f}"
                lines.append(f"{head}{what}: {_met(row.infer_ratio, target, aimed)}; {aside}")
        for neck in TRAINING:
            if neck in named:
                lines.append(f"{head}training memory, {neck} / FPN: {_met(named[neck].memory_ratio, MEMORY, aimed)}")
        lines += _memory_verdicts(head, groups(by_steps).get((detector, size, device), []), aimed)
    return lines


def _met(value: float, target: float, aimed: bool) -> str:
    """The figure and, where there is a target, whether it is met."""
    if not aimed:
        return f"{value:.2f} (no target)"
    return f"{value:.2f} (target {target:g}: {'met' if value <= target else 'not met'})"


def _memory_verdicts(head: str, rows: Sequence[StepRow], aimed: bool) -> list[str]:
    lines = []
    for neck in dict.fromkeys(row.neck for row in rows):
        mine = sorted((row for row in rows if row.neck == neck), key=lambda row: row.steps)
        if len(mine) < 2:
            continue
        growth = mine[-1].train_memory / mine[-2].train_memory
        most = max(row.memory_ratio for row in mine)
        flat = "flat" if growth <= FLAT else "grows"
        how = f"{flat}: {mine[-1].steps} steps take {growth:.3f} times the memory of {mine[-2].steps}"
        worst = f"at most {_met(most, MEMORY, aimed and neck in TRAINING)} of the FPN's"
        lines.append(f"{head}training memory against steps, {_stepped(neck)}: {how}; {worst}")
    return lines


def plot_cost(path: Path, rows: Sequence[Row], by_steps: Sequence[StepRow]) -> None:
    """Time over that of the explicit FPN against MACs, in training and in inference, and memory against steps.

    Args:
        path: image file to write.
        rows: of all detectors, sizes and devices.
        by_steps: memory against steps.
    """
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    necks = list(dict.fromkeys(row.neck for row in rows))
    colours = {neck: COLOURS[i % len(COLOURS)] for i, neck in enumerate(necks)}
    markers = dict(zip(groups(rows), "osD^vPX*" * len(rows), strict=False))
    for axis, what in zip(axes[:2], ("train", "infer"), strict=True):
        _draw_times(axis, rows, what, colours, markers)
    _draw_memory(axes[2], by_steps, colours)
    handles = [plt.Line2D([], [], color=colours[n], marker="o", linestyle="", label=n) for n in necks]
    if len(markers) > 1:
        for (detector, size, device), marker in markers.items():
            label = f"{detector}, {size} px, {device}"
            handles.append(plt.Line2D([], [], color="0.4", marker=marker, linestyle="", label=label))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_times(axis: Any, rows: Sequence[Row], what: str, colours: Mapping[str, str], markers: Mapping) -> None:
    for row in rows:
        marker = markers[row.detector, row.image_size, row.device]
        x, y = getattr(row, f"{what}_mac_ratio"), getattr(row, f"{what}_ratio")
        axis.plot(x, y, color=colours[row.neck], marker=marker, markersize=7, linestyle="")
    far = max(max(getattr(row, f"{what}_mac_ratio"), getattr(row, f"{what}_ratio")) for row in rows)
    axis.plot([1, far], [1, far], color="0.8", zorder=0)
    targets = sorted(set((TRAINING if what == "train" else INFERENCE).values()))
    for target in targets:
        axis.axhline(target, color="0.7", linestyle=":", linewidth=1)
    axis.set_title("training step" if what == "train" else "inference", fontsize=10)
    axis.set_xlabel("MACs over those of the explicit FPN")
    axis.set_ylabel("seconds over those of the explicit FPN (dotted: targets)")
    axis.grid(True, color="0.93", linewidth=0.6)


def _draw_memory(axis: Any, by_steps: Sequence[StepRow], colours: Mapping[str, str]) -> None:
    for mine in groups(by_steps).values():
        for neck in dict.fromkeys(row.neck for row in mine):
            line = [row for row in mine if row.neck == neck]
            dash = "-" if line[0].device == "cpu" else "--"
            axis.plot(
                [r.steps for r in line], [r.memory_ratio for r in line], dash, color=colours[neck], marker="o", ms=4
            )
    axis.axhline(MEMORY, color="0.7", linestyle=":", linewidth=1)
    axis.set_title("peak memory of a training step", fontsize=10)
    axis.set_xlabel("steps of the neck, forward and backward")
    axis.set_ylabel("over that of the explicit FPN (dashed: CUDA)")
    axis.grid(True, color="0.93", linewidth=0.6)
