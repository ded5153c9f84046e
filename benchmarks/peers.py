"""deqkit beside other libraries: the same f, the same start, the same stopping rule.

For every problem, solver and tolerance: calls of f, the residual that the result really has (recomputed in float64),
wall time, wall time over that of as many bare calls of f, and peak memory. A result that its library calls converged
and that is not is counted. For every adjoint: the error of the gradient against the exact one, calls, backward passes,
time and memory; a gradient that is wrong while nothing warns is counted. Libraries that are not installed are left out.

    python benchmarks/peers.py                       # everything: 12 minutes with five libraries
    python benchmarks/peers.py --part solve --problem linear --rtol 1e-5 --repeats 5
    python benchmarks/peers.py --part gradients --problem conv
    python benchmarks/peers.py --calls-only          # no clock: the figures do not depend on the machine
    python benchmarks/peers.py --markdown            # tables to be pasted
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

import peak_memory  # noqa: F401  first: it sets up the profiler's log
import torch
from peer_adjoints import PeerAdjoint, all_adjoints
from peer_gradients import GradientRow, Task, compare_gradients
from peer_plots import plot_peers
from peer_solvers import Peer, all_peers
from peer_solves import MAX_CALLS, SolveRow, compare
from peer_tables import calls_table, formatter, gradients_table, memory_table, targets_table, time_table
from peer_targets import FINE, MIXED, Target, targets
from problems import LARGE_PROBLEMS, PROBLEMS, Problem, build
from reporting import describe, run_record, write_csv, write_json
from tqdm import tqdm

DEFAULT_PROBLEMS = ("tanh_easy", "tanh_hard", "linear", "linear_symmetric", "mixed", "conv", "ifpn")
GRADIENT_PROBLEMS = ("tanh_easy", "linear", "conv", "ifpn")
TOLERANCES = {torch.float32: (1e-3, 1e-5), torch.float64: (1e-10,)}
LIBRARIES = ("torchdeq", "scipy", "xitorch", "deepinv", "jaxopt")


@dataclass(frozen=True)
class Solves:
    """One problem to be solved by some, to one tolerance; with or without a look at peak memory."""

    problem: str
    dtype: torch.dtype
    rtol: float
    peers: tuple[Peer, ...]
    memory: bool = False


def plan_solves(args: argparse.Namespace, peers: Sequence[Peer]) -> list[Solves]:
    """What is solved; the large problems, which two targets need, by deqkit and torchdeq alone.

    Memory takes as long to measure as all the rest, and one tolerance tells what a solver keeps.
    """
    names = args.problem or DEFAULT_PROBLEMS
    first = _dtypes(args)[0]
    telling = first, min(_tolerances(args, first))
    plan = [
        Solves(name, dtype, rtol, tuple(peers), memory=(dtype, rtol) == telling)
        for dtype in _dtypes(args)
        for rtol in _tolerances(args, dtype)
        for name in names
    ]
    if not (args.problem or args.rtol or args.dtype):
        two = tuple(peer for peer in peers if peer.library in ("deqkit", "torchdeq"))
        plan += [
            Solves("ifpn_wide", torch.float32, FINE[1], two),
            Solves(MIXED[0], torch.float32, MIXED[2], two),
        ]
    return plan


def plan_gradients(args: argparse.Namespace) -> list[tuple[str, torch.dtype, float]]:
    """What is differentiated: at the finest tolerance, in float32 where nothing else is asked for."""
    names = args.problem or GRADIENT_PROBLEMS
    return [(name, dtype, min(_tolerances(args, dtype))) for dtype in _dtypes(args)[:1] for name in names]


def _dtypes(args: argparse.Namespace) -> list[torch.dtype]:
    return list(TOLERANCES) if args.dtype is None else [getattr(torch, args.dtype)]


def _tolerances(args: argparse.Namespace, dtype: torch.dtype) -> tuple[float, ...]:
    return tuple(args.rtol or TOLERANCES[dtype])


def measure_solves(build: Callable[[str], Problem], plan: Sequence[Solves], repeats: int) -> list[SolveRow]:
    rows: list[SolveRow] = []
    with tqdm(total=sum(len(part.peers) for part in plan) * (1 + repeats), unit="solve", disable=None) as bar:
        for part in plan:
            bar.set_description(f"{part.problem} to {part.rtol:g}")
            problem = build(part.problem).astype(part.dtype)
            with torch.no_grad():
                rows += compare(problem, part.dtype, (part.rtol,), part.peers, repeats, bar.update, memory=part.memory)
    return rows


def measure_gradients(
    build: Callable[[str], Problem], plan: Sequence[tuple[str, torch.dtype, float]], adjoints: Sequence[PeerAdjoint],
    repeats: int, seed: int,
) -> list[GradientRow]:  # fmt: skip
    rows: list[GradientRow] = []
    with tqdm(total=len(plan) * len(adjoints) * (1 + repeats), unit="gradient", disable=None) as bar:
        for name, dtype, rtol in plan:
            bar.set_description(f"gradients, {name}")
            rows += compare_gradients(Task(build(name).astype(dtype), seed), dtype, rtol, adjoints, repeats, bar.update)
    return rows


def report_solves(rows: Sequence[SolveRow], markdown: bool) -> None:
    table = formatter(markdown)
    for dtype, rtol in dict.fromkeys((row.dtype, row.rtol) for row in rows):
        mine = [row for row in rows if (row.dtype, row.rtol) == (dtype, rtol)]
        print(f"Calls of f until every sample is at {rtol:g} ({dtype}; -: not within {MAX_CALLS})\n")
        print(calls_table(mine, table))
        if any(row.seconds == row.seconds for row in mine):
            print("\nMilliseconds (and the multiple of as many bare calls)\n\n" + time_table(mine, table))
        if any(row.call_memory == row.call_memory for row in mine):
            print("\nPeak memory, in states, beyond start and weights (brackets: not solved; ?: not to be seen)\n")
            print(memory_table(mine, table))
        print()
    wrong = [row for row in rows if row.is_wrong]
    print(f"Failures reported as success: {len(wrong)}" + "".join(f"\n  {row}" for row in wrong) + "\n")


def report_gradients(rows: Sequence[GradientRow], markdown: bool) -> None:
    for problem, dtype, rtol in dict.fromkeys((row.problem, row.dtype, row.rtol) for row in rows):
        mine = [row for row in rows if (row.problem, row.dtype, row.rtol) == (problem, dtype, rtol)]
        print(f"Gradients, {problem}, {dtype}, to {rtol:g} (calls: forward+backward; states: peak memory)\n")
        print(gradients_table(mine, formatter(markdown)) + "\n")
    for row in rows:
        if row.failure:
            print(f"{row.library} {row.adjoint} on {row.problem}: {row.failure}")
    wrong = [f"{row.library} {row.adjoint} on {row.problem}: {row.relative_error:.1e}" for row in rows if row.is_wrong]
    print(f"Wrong gradients without a warning: {len(wrong)}" + "".join(f"\n  {line}" for line in wrong) + "\n")


def write(
    folder: Path, record: dict, solves: Sequence[SolveRow], gradients: Sequence[GradientRow], lines: Sequence[Target]
) -> None:
    """CSV files, everything as JSON, the plot."""
    folder.mkdir(parents=True, exist_ok=True)
    written = ["peers.json", "peers.png"]
    for name, rows in (("peers.csv", solves), ("gradients.csv", gradients)):
        if rows:
            write_csv(folder / name, rows)
            written.append(name)
    tables = {"solves": solves, "gradients": gradients}
    found = {name: [asdict(row) for row in rows] for name, rows in tables.items()}
    write_json(folder / "peers.json", record | found | {"targets": [asdict(t) | {"met": t.met} for t in lines]})
    plot_peers(folder / "peers.png", solves, gradients)
    print(f"written to {folder}: {', '.join(written)}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "solve", "gradients"), default="all", help="default: all")
    parser.add_argument(
        "--problem", choices=[*PROBLEMS, *LARGE_PROBLEMS], action="append", help="only this one; repeatable"
    )
    parser.add_argument("--rtol", type=float, action="append", help="only this tolerance; repeatable")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="only this one")
    parser.add_argument(
        "--library", choices=(*LIBRARIES, "none"), action="append", help="only this one beside deqkit; repeatable"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds of timing; default: 3")
    parser.add_argument("--calls-only", action="store_true", help="no clock")
    parser.add_argument("--quick", action="store_true", help="small problems, for tests")
    parser.add_argument("--seed", type=int, default=0, help="of problems and cotangents; default: 0")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"), help="folder of CSV, JSON and plot")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    for rtol in args.rtol or ():
        if not 0 < rtol < 1:
            parser.error(f"--rtol must be between 0 and 1, got {rtol}")
    if args.rtol and not args.dtype:
        args.dtype = "float32"
    return args


def main(argv: Sequence[str] | None = None) -> tuple[list[SolveRow], list[GradientRow]]:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    libraries = ("deqkit", *(args.library or LIBRARIES))
    peers = [peer for peer in all_peers() if peer.library in libraries]
    adjoints = [adjoint for adjoint in all_adjoints() if adjoint.library in libraries]
    repeats = 0 if args.calls_only else args.repeats
    settings = {"part": args.part, "max_calls": MAX_CALLS, "repeats": repeats, "quick": args.quick}
    labels = [peer.label for peer in peers], [adjoint.label for adjoint in adjoints]
    record = run_record(args.device, args.seed, settings | {"peers": labels[0], "adjoints": labels[1]})
    record["versions"] |= {name: metadata.version(name) for name in sorted({peer.library for peer in peers}
                                                                          - {"deqkit"})}  # fmt: skip
    print(describe(record) + "\n")
    # Once for all dtypes and parts: the reference solutions take a minute.
    made = functools.cache(lambda name: build(name, seed=args.seed, small=args.quick, device=args.device))
    solves: list[SolveRow] = []
    gradients: list[GradientRow] = []
    lines: list[Target] = []
    if args.part != "gradients":
        solves = measure_solves(made, plan_solves(args, peers), repeats)
    if args.part != "solve":
        gradients = measure_gradients(made, plan_gradients(args), adjoints, repeats, args.seed)
    if solves:
        report_solves(solves, args.markdown)
    if gradients:
        report_gradients(gradients, args.markdown)
    if solves:
        lines = targets(solves)
        note = "; those of the small problems say nothing" if args.quick else ""
        print(f"Targets (at most; inf: solved by the other alone{note})\n")
        print(targets_table(lines, formatter(args.markdown)) + "\n")
    write(args.out, record, solves, gradients, lines)
    return solves, gradients


if __name__ == "__main__":
    main()
