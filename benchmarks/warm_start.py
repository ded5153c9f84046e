"""What do better starting points save in a training?

Trains the same small equilibrium model from the same seed with four ways to start a solve: at zero, at the fixed point
that the sample had an epoch ago, at a learned prediction of it, and at the first of these that is known. Counts solver
steps and calls of f, on training samples and on samples never seen, and shows that all arrive at the same loss. A few
minutes on two CPU cores.

    python benchmarks/warm_start.py
    python benchmarks/warm_start.py --solver fixed_point --rtol 1e-3
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

import torch
from options import NamedSolver, parse_solver, positive_int
from reporting import describe, format_table, run_record, write_results
from torch import Tensor, nn
from tqdm import tqdm

import deqkit

STARTS = ("zero", "cache", "learned", "both")


@dataclass(frozen=True)
class Size:
    """How much is trained: samples, state size, epochs."""

    train: int = 1024
    test: int = 256
    features: int = 64
    batch: int = 64
    epochs: int = 20


QUICK = Size(train=64, test=16, features=16, batch=16, epochs=4)


@dataclass(frozen=True)
class Row:
    """One epoch of one training.

    Attributes:
        start: where solves started.
        epoch: from 1.
        loss: mean of the task's loss over the epoch.
        steps: solver steps, mean over samples.
        calls: calls of f per solve of a batch.
        worst_residual: largest relative residual.
        failed: share of samples that did not converge.
        test_loss: of the task, on samples never seen.
        test_steps: like steps, there.
        seconds: of the epoch's training.
    """

    start: str
    epoch: int
    loss: float
    steps: float
    calls: float
    worst_residual: float
    failed: float
    test_loss: float
    test_steps: float
    seconds: float


class Cell(nn.Module):
    """f(x, u) = tanh(W x + U u + b); the spectral radius of W is 0.9 at the start."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.state = nn.Linear(features, features)
        self.input = nn.Linear(features, features, bias=False)
        with torch.no_grad():
            self.state.weight.normal_()
            self.state.weight *= 0.9 / torch.linalg.eigvals(self.state.weight).abs().max()

    def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
        return torch.tanh(self.state(x) + self.input(inputs))


class Model(nn.Module):
    """The equilibrium and a linear read-out, with the means to start it well."""

    def __init__(self, start: str, features: int, solver: deqkit.Solver, rtol: float) -> None:
        super().__init__()
        self.equilibrium = deqkit.nn.FixedPoint(Cell(features), solver=solver, rtol=rtol, max_steps=100)
        self.head = nn.Linear(features, 1)
        self.cache = deqkit.nn.FixedPointCache() if start in ("cache", "both") else None
        generator_state = torch.get_rng_state()  # all models are to have the same weights, the learned start apart
        wide = 4 * features
        module = nn.Sequential(nn.Linear(features, wide), nn.ReLU(), nn.Linear(wide, features), nn.Tanh())
        torch.set_rng_state(generator_state)
        self.learned = deqkit.nn.LearnedStart(module) if start in ("learned", "both") else None

    def forward(self, ids: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (B,), and the auxiliary loss of the start."""
        x0 = predicted = torch.zeros_like(inputs) if self.learned is None else self.learned(inputs)
        if self.cache is not None:
            x0 = self.cache.start(ids, x0)
        x = self.equilibrium(x0, inputs)
        solution = self.equilibrium.last_solution
        assert solution is not None
        if self.cache is not None and self.training:
            self.cache.store(ids, solution)
        auxiliary = x.new_zeros(()) if self.learned is None else self.learned.loss(predicted, solution)
        return self.head(x).squeeze(1), auxiliary


def make_data(size: Size, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs (train + test, features) and what a random model of the same kind answers to them."""
    torch.manual_seed(seed)
    inputs = torch.randn(size.train + size.test, size.features)
    teacher = Model("zero", size.features, deqkit.Anderson(), rtol=1e-5).eval()
    with torch.no_grad():
        targets, _ = teacher(torch.arange(len(inputs)), inputs)
    return inputs, (targets - targets.mean()) / targets.std()


def train(start: str, size: Size, solver: deqkit.Solver, rtol: float, seed: int) -> list[Row]:
    """One training; everything random in it depends on the seed alone."""
    inputs, targets = make_data(size, seed)
    torch.manual_seed(seed + 1)
    model = Model(start, size.features, solver, rtol)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    rows = []
    with deqkit.Monitor(model, every=None) as monitor:
        for epoch in range(1, size.epochs + 1):
            began, losses = time.perf_counter(), []
            for ids in torch.randperm(size.train).split(size.batch):
                out, auxiliary = model.train()(ids, inputs[ids])
                loss = (out - targets[ids]).square().mean()
                optimizer.zero_grad()
                (loss + auxiliary).backward()  # two losses of disjoint parameters: Adam makes a weight idle
                optimizer.step()
                losses.append(loss.detach())
            seconds = time.perf_counter() - began
            with torch.no_grad():
                ids = torch.arange(size.train, len(inputs))
                test_loss = (model.eval()(ids, inputs[ids])[0] - targets[ids]).square().mean().item()
            rows.append(_row(start, epoch, torch.stack(losses).mean().item(), test_loss, seconds, monitor.flush(epoch)))
    return rows


def _row(start: str, epoch: int, loss: float, test_loss: float, seconds: float, figures: dict[str, float]) -> Row:
    layer = {name.removeprefix("equilibrium/"): value for name, value in figures.items()}
    return Row(
        start, epoch, loss, layer["steps_mean"], layer["calls_mean"], layer["relative_residual_worst"],
        layer["failed"], test_loss, figures["equilibrium.eval/steps_mean"], seconds,
    )  # fmt: skip


def report(rows: Sequence[Row]) -> str:
    """A line per way to start: the later half of the training, and all of it against a start at zero."""
    epochs = max(row.epoch for row in rows)
    total = {name: _total_steps(rows, name) for name in dict.fromkeys(row.start for row in rows)}
    lines = []
    for name in total:
        late = [row for row in rows if row.start == name and row.epoch > epochs // 2]
        means = {key: sum(getattr(row, key) for row in late) / len(late) for key in ("steps", "calls", "test_steps")}
        saved = f"{100 * (1 - total[name] / total['zero']):.0f} %" if "zero" in total else ""
        seconds = sum(row.seconds for row in late) / len(late)
        losses = (f"{late[-1].loss:.5f}", f"{late[-1].test_loss:.5f}")
        lines.append([name, *(f"{mean:.2f}" for mean in means.values()), saved, *losses, f"{seconds:.2f}"])
    header = ["start", "steps", "calls per batch", "steps, unseen", "steps saved", "loss", "test loss", "s per epoch"]
    return format_table(header, lines)


def _total_steps(rows: Sequence[Row], start: str) -> float:
    return sum(row.steps for row in rows if row.start == start)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    args = make_parser().parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    size = QUICK if args.quick else Size()
    settings = {"solver": args.solver.label, "rtol": args.rtol, "quick": args.quick, "size": str(size)}
    record = run_record(torch.device("cpu"), args.seed, settings)
    print(describe(record) + "\n")
    rows: list[Row] = []
    for start in tqdm(args.start or STARTS, unit="training", disable=None):
        rows += train(start, size, args.solver.solver, args.rtol, args.seed)
    work = f"{size.train} samples, state of {size.features}, {size.epochs} epochs"
    print(f"{work}, {args.solver.label}, rtol {args.rtol:g}")
    print("steps and calls: mean of the later half of the epochs; steps saved: of all epochs, against zero\n")
    print(report(rows))
    write_results(args.out, "warm_start", rows, record)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--start", choices=STARTS, action="append", metavar="NAME",
        help=f"only this way to start; repeatable; one of {', '.join(STARTS)}",
    )  # fmt: skip
    parser.add_argument(
        "--solver", type=parse_solver, default=NamedSolver("anderson", deqkit.Anderson()),
        metavar="NAME[:SETTING=VALUE,...]", help="the solver (default: anderson)",
    )  # fmt: skip
    parser.add_argument("--rtol", type=_tolerance, default=1e-4, metavar="X", help="relative tolerance (default: 1e-4)")
    parser.add_argument("--quick", action="store_true", help="a few samples and epochs: seconds, for tests")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of data and training (default: 0)")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/warm_start"), metavar="DIR",
        help="folder of the CSV and of the JSON with hardware and versions (default: runs/warm_start)",
    )  # fmt: skip
    return parser


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a tolerance between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
