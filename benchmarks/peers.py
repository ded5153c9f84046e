"""deqkit beside other libraries: the same f, the same start, the same stopping rule.

For every problem, solver and tolerance: calls of f, the residual that the result really has (recomputed in float64),
wall time, and wall time over that of as many bare calls of f. A result that its library calls converged and that is not
is counted. Libraries that are not installed are left out.

    python benchmarks/peers.py
    python benchmarks/peers.py --problem linear --rtol 1e-5 --repeats 5
    python benchmarks/peers.py --calls-only          # no clock: the figures do not depend on the machine
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

import torch
from peer_solvers import Counted, Peer, all_peers
from plots import plot_peers
from problems import PROBLEMS, Problem, build
from reporting import describe, format_table, run_record, write_csv, write_json
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from tqdm import tqdm

DEFAULT_PROBLEMS = ("tanh_easy", "tanh_hard", "linear", "linear_symmetric", "mixed", "conv", "ifpn")
TOLERANCES = {torch.float32: (1e-3, 1e-5), torch.float64: (1e-10,)}
MAX_CALLS = 200
SLACK = 1.05  # f in the working dtype and f in float64 differ by rounding


@dataclass(frozen=True)
class Row:
    """One solve of one problem by one solver to one tolerance.

    Attributes:
        problem: its name.
        library: where the solver comes from.
        solver: its name there.
        dtype: of the state.
        rtol: the tolerance asked for, of every sample.
        calls: of f, counted.
        residual: of the worst sample, |f(x)-x| / |f(x)| in float64.
        solved: whether that is the tolerance or less.
        claims: whether the library says so; "-" where it says nothing.
        seconds: wall time, median of the repeats; NaN without a clock.
        ratio: wall time / time of as many bare calls of f, median of the repeats.
    """

    problem: str
    library: str
    solver: str
    dtype: str
    rtol: float
    calls: int
    residual: float
    solved: bool
    claims: str
    seconds: float
    ratio: float

    @property
    def is_wrong(self) -> bool:
        """Whether a failure is reported as success."""
        return self.claims == "yes" and not self.solved


class Packed:
    """A problem whose state is one tensor (B, D), which all libraries take."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        leaves, self.spec = tree_flatten(problem.x0)
        self.shapes = [leaf.shape for leaf in leaves]
        self.x0 = self.pack(problem.x0)

    def pack(self, x: Any) -> Tensor:
        return torch.cat([leaf.flatten(1) for leaf in tree_flatten(x)[0]], dim=1)

    def unpack(self, x: Tensor) -> Any:
        sizes = [math.prod(shape[1:]) for shape in self.shapes]
        parts = x.split(sizes, dim=1)
        return tree_unflatten([part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)], self.spec)

    def f(self, x: Tensor) -> Tensor:
        """The map on packed states."""
        if len(self.shapes) == 1:
            return self.problem.f(x.view(self.shapes[0])).flatten(1)
        return self.pack(self.problem.f(self.unpack(x)))

    def residual(self, x: Tensor) -> float:
        """Relative residual of the worst sample, in float64."""
        return self.problem.relative_residual(self.unpack(x)).max().item()


def compare(
    problem: Problem, dtype: torch.dtype, tolerances: Sequence[float], peers: Sequence[Peer], repeats: int,
    tick: Callable[[], Any],
) -> list[Row]:  # fmt: skip
    """Every solver on one problem; the repeats are rounds through all solvers, forwards and backwards in turn."""
    packed = Packed(problem)
    cases = [(peer, rtol) for rtol in tolerances for peer in peers]
    seconds: dict[Any, list[float]] = {case: [] for case in cases}
    ratios: dict[Any, list[float]] = {case: [] for case in cases}
    found: dict[Any, tuple[int, float, bool | None]] = {}
    for peer, rtol in cases:
        counted = Counted(packed.f)
        outcome = peer.run(counted, packed.x0, rtol, MAX_CALLS)
        found[peer, rtol] = (counted.calls, packed.residual(outcome.x), outcome.claims)
        tick()
    for round_ in range(repeats):
        bare = timed(lambda: repeat(packed.f, packed.x0, 20)) / 20
        for peer, rtol in cases if round_ % 2 == 0 else reversed(cases):
            duration = timed(lambda peer=peer, rtol=rtol: peer.run(packed.f, packed.x0, rtol, MAX_CALLS))
            seconds[peer, rtol].append(duration)
            ratios[peer, rtol].append(duration / (bare * found[peer, rtol][0]))
            tick()
    return [
        Row(
            problem.name, peer.library, peer.solver, str(dtype).removeprefix("torch."), rtol, calls, residual,
            residual <= SLACK * rtol, {True: "yes", False: "no", None: "-"}[claims],
            statistics.median(seconds[peer, rtol]) if repeats else math.nan,
            statistics.median(ratios[peer, rtol]) if repeats else math.nan,
        )
        for (peer, rtol), (calls, residual, claims) in found.items()
    ]  # fmt: skip


def repeat(f: Callable[[Tensor], Tensor], x: Tensor, times: int) -> None:
    for _ in range(times):
        x = f(x)


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def calls_table(rows: Sequence[Row]) -> str:
    """Calls of f per solver and problem; a dash where the tolerance was not reached."""
    return _table(rows, lambda row: str(row.calls) if row.solved else "wrong" if row.is_wrong else "-")


def time_table(rows: Sequence[Row]) -> str:
    """Milliseconds, and in brackets the multiple of as many bare calls."""
    return _table(rows, lambda row: f"{1e3 * row.seconds:.1f} ({row.ratio:.2f})" if row.solved else "-")


def _table(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    problems = list(dict.fromkeys(row.problem for row in rows))
    labels = list(dict.fromkeys((row.library, row.solver) for row in rows))
    by_key = {(row.library, row.solver, row.problem): row for row in rows}
    lines = [
        [
            " ".join(label),
            *(cell(by_key[*label, problem]) if (*label, problem) in by_key else "" for problem in problems),
        ]
        for label in labels
    ]
    return format_table(["", *problems], lines)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """How the default solver stands to the best of the other libraries, per problem and over all."""
    lines = []
    for what, value in (("calls of f", lambda row: row.calls), ("wall time", lambda row: row.seconds)):
        ratios = []
        for problem in dict.fromkeys(row.problem for row in rows):
            solved = [row for row in rows if row.problem == problem and row.solved and value(row) == value(row)]
            ours = [value(row) for row in solved if (row.library, row.solver) == ("deqkit", "anderson")]
            theirs = [value(row) for row in solved if row.library != "deqkit"]
            if ours and theirs:
                ratios.append(ours[0] / min(theirs))
        if ratios:
            worst = max(ratios)
            lines.append(
                f"{what}, deqkit's default / the best other: {statistics.geometric_mean(ratios):.2f} in geometric "
                f"mean, {worst:.2f} at worst, over {len(ratios)} problems that both solve"
            )
    return lines


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=list(PROBLEMS), action="append", help="only this one; repeatable")
    parser.add_argument("--rtol", type=float, action="append", help="only this tolerance; repeatable")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="only this one")
    parser.add_argument("--library", action="append", help="only this one beside deqkit; repeatable")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timing; default: 5")
    parser.add_argument("--calls-only", action="store_true", help="no clock")
    parser.add_argument("--quick", action="store_true", help="small problems, for tests")
    parser.add_argument("--seed", type=int, default=0, help="of the problems; default: 0")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's")
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


def main(argv: Sequence[str] | None = None) -> list[Row]:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    peers = [peer for peer in all_peers() if not args.library or peer.library in ("deqkit", *args.library)]
    dtypes = [torch.float32, torch.float64] if args.dtype is None else [getattr(torch, args.dtype)]
    names, repeats = args.problem or list(DEFAULT_PROBLEMS), 0 if args.calls_only else args.repeats
    plan = [(name, dtype, args.rtol or TOLERANCES[dtype]) for dtype in dtypes for name in names]
    settings = {"problems": names, "max_calls": MAX_CALLS, "repeats": repeats, "quick": args.quick}
    record = run_record(torch.device("cpu"), args.seed, settings | {"peers": [peer.label for peer in peers]})
    print(describe(record) + "\n")
    rows: list[Row] = []
    total = sum(len(tolerances) * len(peers) * (1 + repeats) for _, _, tolerances in plan)
    with tqdm(total=total, unit="solve", disable=None) as bar, torch.no_grad():
        for name, dtype, tolerances in plan:
            bar.set_description(name)
            problem = build(name, seed=args.seed, small=args.quick, dtype=dtype)
            rows += compare(problem, dtype, tolerances, peers, repeats, bar.update)
    for dtype in dtypes:
        for rtol in args.rtol or TOLERANCES[dtype]:
            mine = [row for row in rows if row.rtol == rtol and row.dtype == str(dtype).removeprefix("torch.")]
            print(f"Calls of f until every sample is at {rtol:g} ({mine[0].dtype}; -: not within {MAX_CALLS})")
            print(calls_table(mine))
            if repeats:
                print("\nMilliseconds (and the multiple of as many bare calls)\n" + time_table(mine))
            print("\n".join(verdicts(mine)) + "\n")
    wrong = [row for row in rows if row.is_wrong]
    print(f"Failures reported as success: {len(wrong)}" + "".join(f"\n  {row}" for row in wrong))
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "peers.csv", rows)
    write_json(args.out / "peers.json", record)
    plot_peers(args.out / "peers.png", rows)
    print(f"written: {args.out}/peers.csv, .json, .png")
    return rows


if __name__ == "__main__":
    main()
