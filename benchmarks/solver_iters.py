"""How accurate is a fixed point after k solver steps, and what does it cost?

Without arguments: solves problems whose solution is known with every solver and every number of steps, and writes a
table, a CSV and a plot of the true error, the residual and the time. A few minutes on two CPU cores.

    python benchmarks/solver_iters.py
    python benchmarks/solver_iters.py --problem linear --solver anderson:history=20 --steps 0-20,30,50

With --detector: how many steps does the i-FPN neck of a trained detector need? Evaluates the checkpoint with growing
numbers of steps.

    python benchmarks/solver_iters.py --detector runs/retinanet_ifpn/ifpn/checkpoints/best.ckpt
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

import torch
from measure import Row, measure, num_solves
from options import NamedSolver, default_solvers, named, parse_solver, parse_steps
from plots import plot_accuracy, plot_detector
from problems import PROBLEMS, Problem, ProblemError, build
from reporting import DetectorError, describe, format_table, run_record, write_csv, write_json
from tqdm import tqdm

TABLE_STEPS = (1, 2, 3, 5, 7, 10, 15, 20)
THRESHOLDS = (1e-1, 1e-2, 1e-3, 1e-4)
COLUMNS = {"error, median": "error_median", "error, worst": "error_worst", "residual, median": "residual_median"}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        return run_detector(args) if args.detector else run_microproblems(args)
    except (ProblemError, DetectorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is computed or written."""
    folder = next(folder for folder in (args.out.absolute(), *args.out.absolute().parents) if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        parser.error(f"--out: cannot write to {folder}")
    if args.detector is None:
        for name in ("data", "images"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} belongs to --detector")
        return
    for name in ("problem", "quick", "repeats", "seed", "dtype"):
        if getattr(args, name) not in (None, False):
            parser.error(f"--{name} does not go with --detector")
    if not args.detector.is_file():
        parser.error(f"--detector: checkpoint {args.detector} does not exist")
    if args.steps and args.steps[0] == 0:
        parser.error("--steps: the neck of a detector needs at least one step; with none its pyramid is zero")


def run_microproblems(args: argparse.Namespace) -> int:
    """Measure the problems asked for, print the tables, write the files."""
    names = list(dict.fromkeys(args.problem or PROBLEMS))
    seed, dtype_name = args.seed or 0, args.dtype or "float32"
    solvers = _distinct([*default_solvers(), *args.solver])
    steps = args.steps or parse_steps("0-10,15,20" if args.quick else "0-20")
    repeats = args.repeats or (1 if args.quick else 3)
    device, dtype = torch.device(args.device), DTYPES[dtype_name]
    record = run_record(
        device,
        seed,
        {"problems": names, "solvers": [s.label for s in solvers], "steps": steps, "repeats": repeats}
        | {"dtype": dtype_name, "quick": args.quick},
    )
    print(describe(record) + "\n")

    rows: list[Row] = []
    problems: list[Problem] = []
    total = len(names) * num_solves(solvers, steps, repeats)
    with tqdm(total=total, unit="solve", disable=None) as bar:
        for name in names:
            bar.set_description(f"{name}: reference")
            problem = build(name, seed=seed, small=args.quick, dtype=dtype, device=device)
            bar.set_description(name)
            rows += measure(problem, solvers, steps, repeats, bar.update)
            problems.append(problem)
    print_report(problems, rows, steps)
    record["problems"] = {p.name: {"title": p.title, "spectral_radius": p.radius} for p in problems}
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "solver_iters.csv", rows)
    write_json(args.out / "solver_iters.json", record)
    plot_accuracy(args.out / "solver_iters.png", rows, {p.name: p.title for p in problems})
    print(f"\nwritten: {args.out}/solver_iters.csv, .json, .png")
    wrong = [row for row in rows if not row.residual_confirmed]
    if wrong:
        first = wrong[0]
        print(
            f"error: {len(wrong)} of {len(rows)} solves reported a residual that is not that of the value returned, "
            f"the first: {first.problem}, {first.solver}, {first.steps} steps",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def run_detector(args: argparse.Namespace) -> int:
    """Evaluate a trained detector with growing numbers of steps, print the table and the answer, write the files."""
    try:
        import detector_steps
    except ImportError as error:
        raise DetectorError(f"--detector needs the detection extra: {error}") from error

    detector = detector_steps.load(args.detector, args.data, args.images, args.device)
    solvers = _distinct(args.solver or [named(detector.neck.solver)])
    steps = args.steps or list(TABLE_STEPS)
    settings = {"checkpoint": str(args.detector), "data": str(detector.data_root), "images": detector.num_images}
    settings |= {"solvers": [s.label for s in solvers], "steps": steps, "neck": repr(detector.neck.settings)}
    record = run_record(torch.device(args.device), None, settings)
    print(describe(record))
    print(f"{detector.num_images} images of {detector.data_root}; residuals are those of the neck's own norm\n")
    with tqdm(total=detector.num_batches * (1 + len(solvers) * len(steps)), unit="batch", disable=None) as bar:
        rows = detector_steps.sweep(detector, solvers, steps, bar.update)
    print(detector_steps.detector_table(rows))
    answers = [detector_steps.answer(rows, named_solver.label) for named_solver in solvers]
    print("\n" + "\n".join(answers))
    record["answers"] = answers
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "detector.csv", rows)
    write_json(args.out / "detector.json", record)
    title = f"{args.detector.name}: {detector.num_images} images"
    plot_detector(args.out / "detector.png", rows, title)
    print(f"\nwritten: {args.out}/detector.csv, .json, .png")
    return 0


def print_report(problems: Sequence[Problem], rows: Sequence[Row], steps: Sequence[int]) -> None:
    """A table per problem and one over all problems."""
    shown = [k for k in TABLE_STEPS if k in steps] or list(steps[:8])
    shown += [k for k in steps if k > TABLE_STEPS[-1]]
    print("The value returned is the best point visited, by its residual. x calls: time / time of as many bare calls.")
    for problem in problems:
        mine = [row for row in rows if row.problem == problem.name]
        print(f"\n{problem.title}; spectral radius of df/dx at x*: {problem.radius:.3f}")
        print(_problem_table(mine, shown))
    limits = ", ".join(f"{limit:g}" for limit in THRESHOLDS)
    print(f"\nSteps until the true error of every sample is at most {limits} (-: not within {steps[-1]}):")
    print(_threshold_table(problems, rows))
    confirmed = sum(row.residual_confirmed for row in rows)
    print(f"\nReported residuals that agree with float64 ones of the value returned: {confirmed} of {len(rows)}.")


def _problem_table(rows: Sequence[Row], shown: Sequence[int]) -> str:
    labels = list(dict.fromkeys(row.solver for row in rows))
    found = {(row.solver, row.steps): row for row in rows}
    lines: list[list[str]] = []
    for heading, field in COLUMNS.items():
        for label in labels:
            cells = [f"{getattr(found[label, k], field):.1e}" for k in shown]
            # The cost belongs to the last step count; once per solver is enough.
            last = found[label, shown[-1]] if field == "error_median" else None
            cost = [str(last.calls), f"{1e3 * last.seconds:.1f}", f"{last.overhead:.2f}"] if last else [""] * 3
            lines.append([heading if label == labels[0] else "", label, *cells, *cost])
    return format_table(["steps", "", *(str(k) for k in shown), "calls", "ms", "x calls"], lines)


def _threshold_table(problems: Sequence[Problem], rows: Sequence[Row]) -> str:
    labels = list(dict.fromkeys(row.solver for row in rows))
    lines = []
    for problem in problems:
        cells = []
        for label in labels:
            mine = [row for row in rows if row.problem == problem.name and row.solver == label]
            first = [next((str(r.steps) for r in mine if r.error_worst <= limit), "-") for limit in THRESHOLDS]
            cells.append(" ".join(word.rjust(3) for word in first))
        lines.append([problem.name, *cells])
    return format_table(["", *labels], lines)


def _distinct(solvers: Sequence[NamedSolver]) -> list[NamedSolver]:
    return list({named.label: named for named in solvers}.values())


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--solver", type=parse_solver, action="append", default=[], metavar="NAME[:SETTING=VALUE,...]",
        help="one more solver beside the three with their defaults, such as anderson:history=20; with --detector: "
        "instead of the neck's own; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--problem", choices=list(PROBLEMS), action="append", metavar="NAME",
        help=f"only this problem; repeatable; one of {', '.join(PROBLEMS)}",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=parse_steps, metavar="LIST",
        help="step counts, as 0-20,30,50 (default: 0-20; with --detector: 1,2,3,5,7,10,15,20)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=_positive_int, metavar="N", help="rounds of timing (default: 3)")
    parser.add_argument("--quick", action="store_true", help="small problems, one round of timing: seconds, for tests")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the problems (default: 0)")
    parser.add_argument("--dtype", choices=DTYPES, help="working dtype of f (default: float32)")
    parser.add_argument("--device", type=_device, default="cpu", help="where f runs: cpu, cuda, ... (default: cpu)")
    parser.add_argument("--threads", type=_positive_int, metavar="N", help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/solver_iters"), metavar="DIR",
        help="folder of the CSV, the JSON with hardware and versions, and the plot (default: runs/solver_iters)",
    )  # fmt: skip
    parser.add_argument(
        "--detector", type=Path, metavar="CHECKPOINT",
        help="measure AP against solver steps of this detector, trained by examples/retinanet_ifpn.py",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, metavar="ROOT", help="COCO-layout folder to evaluate on (default: the one trained on)"
    )
    parser.add_argument("--images", type=_positive_int, metavar="N", help="with --detector: the first N images only")
    return parser


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _device(text: str) -> str:
    try:
        torch.zeros((), device=text).item()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"device {text!r} cannot be used: {reason}") from None
    return text


if __name__ == "__main__":
    sys.exit(main())
