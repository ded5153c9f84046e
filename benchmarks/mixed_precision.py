"""What does a solve in mixed precision save?

Solves each problem by a solver alone and by `deqkit.MixedPrecision` of it, and tells calls of f in low and in full
precision, the time of a call in each, and the time of the solve as a multiple of the solver's alone: as those calls
come to, and by the clock. Times are the fastest of interleaved rounds. A few minutes on a CPU core, most of them for
i-FPN, whose reference solution comes first.

    python benchmarks/mixed_precision.py --threads 1
    python benchmarks/mixed_precision.py --problem conv --problem tanh_hard --solver broyden --dtype float16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

import torch
from options import NamedSolver, parse_solver, positive_int
from problems import LARGE_PROBLEMS, PROBLEMS, Problem, build
from reporting import describe, format_table, run_record, timed, write_results

import deqkit

TOLERANCES = (0.15, 1e-2, 1e-3, 1e-5)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Row:
    """One problem at one tolerance.

    Attributes:
        problem: its name.
        rtol: the tolerance.
        calls: of f by the solver alone.
        low_calls: of f in low precision, by mixed precision.
        full_calls: of f in full precision, by mixed precision.
        full_ms: time of a bare call in full precision.
        low_ms: and in low precision.
        by_calls: time of the calls in mixed precision / time of those of the solver alone.
        by_clock: time of the solve in mixed precision / time of that by the solver alone.
        unsolved: samples that one of both did not solve.
    """

    problem: str
    rtol: float
    calls: int
    low_calls: int
    full_calls: int
    full_ms: float
    low_ms: float
    by_calls: float
    by_clock: float
    unsolved: int


class Solves:
    """The solves of one problem, which count the calls of f by their precision.

    Args:
        problem: the problem.
        solver: in full precision.
        dtype: low precision.
        device: where they run.
    """

    def __init__(self, problem: Problem, solver: deqkit.Solver, dtype: torch.dtype, device: torch.device) -> None:
        self.problem, self.dtype, self.device = problem, dtype, device
        self.solvers = solver, deqkit.MixedPrecision(solver, dtype)
        self.norm = "leaf_max" if problem.name.startswith("ifpn") else None
        self.calls = {True: 0, False: 0}

    def f(self, x: object) -> object:
        """The problem's map."""
        self.calls[torch.is_autocast_enabled(self.device.type)] += 1
        return self.problem.f(x)

    def bare_call(self, low: bool) -> float:
        """Milliseconds of one."""
        with torch.no_grad(), torch.autocast(self.device.type, dtype=self.dtype, enabled=low):
            return 1e3 * timed(lambda: self.problem.f(self.problem.x0), self.device)

    def solve(self, solver: deqkit.Solver, rtol: float) -> tuple[deqkit.Solution, dict[bool, int]]:
        """The solution, and the calls of f, by whether they were in low precision."""
        self.calls = {True: 0, False: 0}
        with torch.no_grad():
            sol = deqkit.solve(
                self.f, self.problem.x0, solver=solver, rtol=rtol, max_steps=200, norm=self.norm, on_failure="ignore"
            )
        return sol, self.calls

    def measure(self, rtol: float, repeats: int) -> Row:
        """One row of the table; ``repeats`` rounds of each."""
        (alone, own), (mixed, calls) = (self.solve(solver, rtol) for solver in self.solvers)
        bare, seconds = {True: [], False: []}, ([], [])
        for _ in range(repeats):
            for low in (False, True):
                bare[low].append(self.bare_call(low))
            for solver, spent in zip(self.solvers, seconds, strict=True):
                spent.append(timed(lambda solver=solver: self.solve(solver, rtol), self.device))
        full, low = min(bare[False]), min(bare[True])
        return Row(
            problem=self.problem.name, rtol=rtol, calls=own[False], low_calls=calls[True], full_calls=calls[False],
            full_ms=full, low_ms=low, by_calls=(calls[True] * low + calls[False] * full) / (own[False] * full),
            by_clock=min(seconds[1]) / min(seconds[0]), unsolved=int((~(alone.converged & mixed.converged)).sum()),
        )  # fmt: skip


def report(rows: Sequence[Row]) -> str:
    """The table."""
    header = ("problem", "rtol", "calls", "low", "full", "ms a call", "low", "by calls", "by clock", "unsolved")
    lines = [
        (r.problem, f"{r.rtol:g}", str(r.calls), str(r.low_calls), str(r.full_calls), f"{r.full_ms:.2f}",
         f"{r.low_ms:.2f}", f"{r.by_calls:.2f}", f"{r.by_clock:.2f}", str(r.unsolved))
        for r in rows
    ]  # fmt: skip
    return format_table(header, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    args = make_parser().parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    names = args.problem or ["ifpn_large", "conv", "tanh_hard"]
    settings = {"solver": args.solver.label, "dtype": args.dtype, "repeats": args.repeats, "small": args.small}
    record = run_record(device, args.seed, settings | {"problems": names})
    print(describe(record) + "\n", flush=True)
    rows: list[Row] = []
    for name in names:
        problem = build(name, seed=args.seed, small=args.small, device=device)
        solves = Solves(problem, args.solver.solver, DTYPES[args.dtype], device)
        rows += [solves.measure(rtol, args.repeats) for rtol in TOLERANCES]
    print(f"{args.solver.label} alone, and in mixed precision ({args.dtype}), whose time is a multiple of the former's")
    print(report(rows))
    write_results(args.out, "mixed_precision", rows, record)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--problem", choices=[*PROBLEMS, *LARGE_PROBLEMS], action="append", help="this one (repeatable)"
    )
    parser.add_argument(
        "--solver", type=_single_solver, default=NamedSolver("anderson", deqkit.Anderson()),
        metavar="NAME[:SETTING=VALUE,...]", help="the solver of both (default: anderson)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="low precision (default: bfloat16)")
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N", help="rounds (default: 5)")
    parser.add_argument("--small", action="store_true", help="small problems: seconds, for tests")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the problems (default: 0)")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/mixed_precision"), metavar="DIR",
        help="folder of the CSV and of the JSON with hardware and versions (default: runs/mixed_precision)",
    )  # fmt: skip
    return parser


def _single_solver(text: str) -> NamedSolver:
    solver = parse_solver(text)
    try:
        deqkit.MixedPrecision(solver.solver)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return solver


if __name__ == "__main__":
    sys.exit(main())
