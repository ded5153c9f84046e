"""A training that loses its equilibria, and what holds it.

Trains the same small equilibrium model from the same seed, on labels that it can only learn by heart, with a learning
rate that soon drives the spectral radius of df/dx above 1: as it is, with a Jacobian penalty, with a penalty on the
spectral norm, and with the norm of its weight capped. Shows solver steps, residuals, failures and the radius over the
training. About three minutes on two CPU cores.

    python benchmarks/stability.py
    python benchmarks/stability.py --steps 100 --variant free --variant norm_cap
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

import torch
from matplotlib.figure import Figure
from reporting import describe, format_table, run_record, write_csv, write_json
from torch import Tensor, nn
from tqdm import tqdm

import deqkit

TITLES = {
    "free": "nothing done about it",
    "jacobian_penalty": "Jacobian penalty, weight 10",
    "norm_penalty": "spectral-norm penalty above 0.9, weight 1",
    "norm_cap": "spectral norm of W capped at 0.9",
}
SAMPLES, FEATURES, CLASSES, BATCH = 256, 64, 10, 64


@dataclass(frozen=True)
class Row:
    """Some steps of one training.

    Attributes:
        variant: what was done to hold it.
        step: optimiser steps so far.
        loss: cross-entropy, mean over the steps since the last row.
        steps: solver steps, mean over samples.
        worst_residual: largest relative residual.
        failed: share of samples whose solve did not converge.
        adjoint_failed: likewise, of the backward solves.
        radius: largest spectral radius of df/dx over the samples of one batch.
    """

    variant: str
    step: int
    loss: float
    steps: float
    worst_residual: float
    failed: float
    adjoint_failed: float
    radius: float


class Cell(nn.Module):
    """f(x, u) = tanh(W x + U u + b), with a gain that lets an entry's slope reach 1."""

    def __init__(self, capped: bool) -> None:
        super().__init__()
        self.state = nn.Linear(FEATURES, FEATURES)
        self.input = nn.Linear(FEATURES, FEATURES, bias=False)
        with torch.no_grad():
            self.state.weight.normal_()
            self.state.weight *= 0.5 / torch.linalg.eigvals(self.state.weight).abs().max()
        if capped:
            deqkit.nn.spectral_norm(self.state, cap=0.9)

    def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
        return torch.tanh(self.state(x) + self.input(inputs))


class Model(nn.Module):
    """The equilibrium and a linear read-out."""

    def __init__(self, capped: bool) -> None:
        super().__init__()
        self.equilibrium = deqkit.nn.FixedPoint(Cell(capped), max_steps=30)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, CLASSES) and the fixed points they are read from."""
        x = self.equilibrium(torch.zeros_like(inputs), inputs)
        return self.head(x), x


def penalty(variant: str, model: Model, x: Tensor, inputs: Tensor) -> Tensor:
    cell = model.equilibrium.module
    if variant == "jacobian_penalty":
        return 10 * deqkit.jacobian_penalty(cell, x, (inputs,))
    if variant == "norm_penalty":
        return deqkit.spectral_norm_penalty(cell, x, (inputs,), target=0.9)
    return x.new_zeros(())


def train(variant: str, num_steps: int, every: int, lr: float, seed: int) -> list[Row]:
    """One training; everything random in it depends on the seed alone."""
    torch.manual_seed(seed)
    inputs, labels = torch.randn(SAMPLES, FEATURES), torch.randint(CLASSES, (SAMPLES,))
    model = Model(variant == "norm_cap")
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    order = torch.Generator().manual_seed(seed + 1)
    rows, losses = [], []
    with deqkit.Monitor(model, every=None) as monitor:
        for step in tqdm(range(1, num_steps + 1), variant, leave=False):
            ids = torch.randint(SAMPLES, (BATCH,), generator=order)
            logits, x = model(inputs[ids])
            loss = nn.functional.cross_entropy(logits, labels[ids])
            optimizer.zero_grad()
            (loss + penalty(variant, model, x, inputs[ids])).backward()
            optimizer.step()
            losses.append(loss.item())
            if step % every == 0 or step == num_steps:
                rows.append(measure(variant, step, losses, model, monitor, inputs[ids], x))
                losses = []
    return rows


def measure(
    variant: str, step: int, losses: list[float], model: Model, monitor: deqkit.Monitor, inputs: Tensor, x: Tensor
) -> Row:
    figures = monitor.flush(step)
    with warnings.catch_warnings():  # where it is not known to three digits, two will do for a picture
        warnings.simplefilter("ignore", deqkit.ConvergenceWarning)
        radius = deqkit.spectral_radius(model.equilibrium.module, x.detach(), (inputs,), max_products=100)
    of = {name.rpartition("/")[2]: value for name, value in figures.items()}
    return Row(
        variant, step, sum(losses) / len(losses), of["steps_mean"], of["relative_residual_worst"], of["failed"],
        of["adjoint_failed"], radius.max().item(),
    )  # fmt: skip


def plot(rows: list[Row], path: Path) -> None:
    """Radius, residual, steps and failures over the training, a line for each variant."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    panels = {
        "largest spectral radius of df/dx": "radius",
        "largest relative residual": "worst_residual",
        "solver steps, mean": "steps",
        "share of solves that failed": "failed",
    }
    variants = list(dict.fromkeys(row.variant for row in rows))
    for axes, (title, name) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
        for variant in variants:
            own = [row for row in rows if row.variant == variant]
            axes.plot([row.step for row in own], [getattr(row, name) for row in own], label=TITLES[variant])
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if name == "radius":
            axes.axhline(1, color="0.4", linestyle="--", linewidth=1)
        if name == "worst_residual":
            axes.set_yscale("log")
            axes.axhline(1e-4, color="0.4", linestyle="--", linewidth=1)
    for axes in figure.axes[2:]:
        axes.set_xlabel("optimiser step")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", choices=list(TITLES), help="one to run, repeatable; default: all")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="optimiser steps (default 300)")
    parser.add_argument("--every", type=int, default=10, metavar="N", help="steps from one figure to the next")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate of Adam (default 1e-2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/stability"), help="folder of the results")
    args = parser.parse_args(argv)
    for name in ("steps", "every", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    record = run_record(torch.device("cpu"), args.seed, {k: v for k, v in vars(args).items() if k != "out"})
    print(describe(record), end="\n\n")
    rows = []
    for variant in args.variant or TITLES:
        rows += train(variant, args.steps, args.every, args.lr, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "stability.csv", rows)
    write_json(args.out / "stability.json", record)
    plot(rows, args.out / "stability.png")
    table = []
    for variant in dict.fromkeys(row.variant for row in rows):
        own = [row for row in rows if row.variant == variant]
        last, worst = own[-1], max(row.failed for row in own)
        table.append(
            [TITLES[variant], f"{last.loss:.3f}", f"{last.radius:.2f}", f"{last.steps:.1f}",
             f"{last.worst_residual:.1e}", f"{last.failed:.0%}", f"{worst:.0%}", f"{last.adjoint_failed:.0%}"]
        )  # fmt: skip
    header = ["at the end", "loss", "radius", "steps", "worst residual", "failed", "(at most)", "adjoint failed"]
    print(format_table(header, table))
    print(f"\n{args.out / 'stability.csv'}, {args.out / 'stability.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
