"""How accurate is a fixed point after k solver steps, what does it cost, and how many steps does i-FPN need?

First, problems whose solution is known, with every solver and every number of steps: the true error, the residual and
the time. Then a detector with the i-FPN neck: besides these its AP, against that with the pyramid at rest. The detector
is a small one, trained by the first run and kept; --detector takes another. Each part ends in a table, a CSV, a JSON
and a picture. A quarter of an hour on one CPU core, a third of it for the training, which later runs do without.

    python benchmarks/solver_iters.py
    python benchmarks/solver_iters.py --only problems --problem linear --solver gmres --steps 0-20,30,50
    python benchmarks/solver_iters.py --only detector --detector model.ckpt --data path/to/coco --steps 0-10
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

import torch
from measure import Row, measure, num_solves
from options import (
    SOLVERS,
    UNROLL,
    UNROLLED,
    NamedSolver,
    default_solvers,
    named,
    parse_solver,
    parse_steps,
    positive_int,
)
from plots import plot_accuracy
from problems import PROBLEMS, Problem, ProblemError, build
from reporting import DetectorError, describe, format_table, run_record, write_results
from tqdm import tqdm

import deqkit

CACHE = Path("runs/small_detector")
MIXING = 2.0
AFFINE = ("linear", "linear_symmetric", "mixed")  # of the problems
OF_PROBLEMS, OF_DETECTOR = ("problem", "repeats", "dtype"), ("detector", "data", "images", "retrain", "cache", "mixing")
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
    parts = {"problems": run_problems, "detector": run_detector}
    try:
        codes = [run(args) for name, run in parts.items() if args.only in (None, name)]
    except (ProblemError, DetectorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: what is written is whole, and a detector that was trained is kept", file=sys.stderr)
        return 130
    return max(codes)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is computed or written."""
    folder = next(folder for folder in (args.out.absolute(), *args.out.absolute().parents) if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        parser.error(f"--out: cannot write to {folder}")
    for part, names in (("detector", OF_PROBLEMS), ("problems", OF_DETECTOR)):
        for name in names:
            if args.only == part and getattr(args, name) not in (None, False):
                parser.error(f"--{name} does not go with --only {part}")
    if args.detector is None and args.data is not None:
        parser.error("--data belongs to --detector: the small detector has images of its own")
    if args.detector is not None:
        for name in ("retrain", "cache", "mixing"):
            if getattr(args, name) not in (None, False):
                parser.error(f"--{name} does not go with --detector: it is about the small one that is trained here")
        for name in ("quick", "seed"):
            if args.only == "detector" and getattr(args, name) not in (None, False):
                parser.error(f"--{name} does not go with --only detector and --detector")
        if not args.detector.is_file():
            parser.error(f"--detector: checkpoint {args.detector} does not exist")
    check_solvers(parser, args)


def check_solvers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse solvers that cannot solve what is asked for."""
    for named_solver in args.solver:
        label, problems = named_solver.label, args.problem or PROBLEMS
        if named_solver.solver.for_affine:
            others = [name for name in problems if name not in AFFINE]
            if args.only != "problems" or others:
                what = "i-FPN's G is not" if args.only != "problems" else f"{', '.join(others)} are not"
                choice = " ".join(f"--problem {name}" for name in AFFINE)
                parser.error(f"--solver {label} solves equations affine in x alone, {what}: --only problems {choice}")
        if label == UNROLL and args.only == "problems":
            parser.error(f"--solver {UNROLL} is the neck's: on problems it is fixed_point")


def run_problems(args: argparse.Namespace) -> int:
    """Measure the problems asked for, print the tables, write the files."""
    names = list(dict.fromkeys(args.problem or PROBLEMS))
    seed, dtype_name = args.seed or 0, args.dtype or "float32"
    solvers = _distinct([s for s in args.solver if s.label != UNROLL] or default_solvers())
    steps = args.steps or parse_steps("0-10,15,20" if args.quick else "0-20")
    say_what_differs(solvers)
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
    titles = {p.name: p.title for p in problems}
    write_results(args.out, "solver_iters", rows, record, lambda path: plot_accuracy(path, rows, titles))
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
        import detector_report as report
        import detector_steps
        from detector_plot import plot_detector
    except ImportError as error:
        raise DetectorError(f"the detector needs the detection extra: {error}") from error

    checkpoint, data = args.detector, args.data
    if checkpoint is None:
        checkpoint, data = trained_here(args)
    detector = detector_steps.load(checkpoint, data, args.images, args.device)
    solvers = _distinct(args.solver or default_solvers_of(detector.neck.solver))
    steps = args.steps or parse_steps("0-2,7,15" if args.quick else "0-20")
    say_what_differs(solvers)
    settings = {"checkpoint": str(checkpoint), "data": str(detector.data_root), "images": detector.num_images}
    settings |= {"solvers": [s.label for s in solvers], "steps": steps, "neck": repr(detector.neck.settings)}
    settings |= {"detector": detector.title, "trained": detector.trained}
    record = run_record(torch.device(args.device), detector.trained.get("seed"), settings)
    print(describe(record))
    print(f"{detector.title}, {detector.num_images} images of {detector.data_root}\n")
    total = detector.num_batches * detector_steps.num_cases(solvers, steps)
    with tqdm(total=total, unit="batch", disable=None) as bar:
        rows = detector_steps.sweep(detector, solvers, steps, bar.update)
    radii = detector_steps.spectral_radii(detector)
    print(report.detector_table(rows))
    remarks = [report.contraction(radii), *filter(None, [report.not_at_rest(rows)])]
    answers = [report.answer(rows, named_solver.label) for named_solver in solvers]
    answers += filter(None, [report.beside_the_paper(rows)])
    print("\n".join(["", *remarks, "", "How many steps does i-FPN need?", *answers]))
    record |= {"spectral_radii": radii.tolist(), "answers": answers}
    title = f"{detector.title}; {detector.num_images} images"
    write_results(args.out, "detector", rows, record, lambda path: plot_detector(path, rows, title, radii))
    return 0


def trained_here(args: argparse.Namespace) -> tuple[Path, Path]:
    """The small detector's checkpoint and its images."""
    from small_detector import small_detector

    from adapters.detection.data import DataError

    try:
        path = small_detector(
            args.cache or CACHE, args.device, seed=args.seed or 0, mixing=args.mixing or MIXING, quick=args.quick,
            retrain=args.retrain,
        )  # fmt: skip
    except (DataError, OSError) as error:
        raise DetectorError(str(error)) from error
    return path, path.parent / "data"


def default_solvers_of(own: str | deqkit.Solver) -> list[NamedSolver]:
    """The default ones, but in place of one of them the neck's own, where they differ in settings alone."""
    mine = named(own)
    others = [s for s in default_solvers() if s.solver.name != mine.solver.name]
    return sorted([*others, mine], key=lambda s: list(SOLVERS).index(s.solver.name))


def say_what_differs(solvers: Sequence[NamedSolver]) -> None:
    """It is another solver here, which the rows do not tell."""
    for named_solver in solvers:
        if isinstance(named_solver.solver, deqkit.Auto):
            first = named_solver.solver.solvers[0]
            print(f"{named_solver.label}: in a fixed number of steps it stays with its first solver, {first}")
        if isinstance(named_solver.solver, deqkit.MixedPrecision):
            only = named_solver.solver.solver
            print(f"{named_solver.label}: in a fixed number of steps all are in full precision, by {only}")


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
    parser.add_argument("--only", choices=("problems", "detector"), help="run one part alone (default: both)")
    parser.add_argument(
        "--solver", type=_solver, action="append", default=[], metavar="NAME[:SETTING=VALUE,...]",
        help=f"measure this one, such as anderson:history=20; repeatable; one of {', '.join(SOLVERS)}, and for the "
        f"detector {UNROLL}, its neck's plain steps (default: {', '.join(s.label for s in default_solvers())}, for the "
        "detector with the settings of its neck)",
    )  # fmt: skip
    parser.add_argument(
        "--problem", choices=list(PROBLEMS), action="append", metavar="NAME",
        help=f"only this problem; repeatable; one of {', '.join(PROBLEMS)}",
    )  # fmt: skip
    parser.add_argument("--steps", type=parse_steps, metavar="LIST", help="step counts, as 0-20,30,50 (default: 0-20)")
    parser.add_argument("--repeats", type=positive_int, metavar="N", help="rounds of timing (default: 3)")
    parser.add_argument(
        "--quick", action="store_true",
        help="small problems, one round of timing, a detector that has learnt nothing: seconds, for tests",
    )  # fmt: skip
    parser.add_argument("--seed", type=_seed, metavar="N", help="seed of the problems and the training (default: 0)")
    parser.add_argument("--dtype", choices=DTYPES, help="working dtype of f (default: float32)")
    parser.add_argument("--device", type=_device, default="cpu", help="where f runs: cpu, cuda, ... (default: cpu)")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/solver_iters"), metavar="DIR",
        help="folder of the CSV, the JSON with hardware and versions, and the plot (default: runs/solver_iters)",
    )  # fmt: skip
    parser.add_argument(
        "--detector", type=Path, metavar="CHECKPOINT",
        help="a detector with the i-FPN neck, trained by examples/retinanet_ifpn.py or python -m adapters.detection "
        "(default: a small one that is trained here)",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, metavar="ROOT",
        help="COCO-layout folder to evaluate --detector on (default: the one trained on)",
    )  # fmt: skip
    parser.add_argument("--images", type=positive_int, metavar="N", help="the first N images only, for the detector")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help=f"where the small detector is kept (default: {CACHE})"
    )
    parser.add_argument(
        "--mixing", type=_positive_float, metavar="FACTOR",
        help="of the random weights that G of the small detector mixes its channels and levels with, before training "
        f"(default: {MIXING:g}, which makes its 64 channels mix as strongly as the paper's 256)",
    )  # fmt: skip
    parser.add_argument("--retrain", action="store_true", help="train the small detector anew")
    return parser


def _solver(text: str) -> NamedSolver:
    return UNROLLED if text == UNROLL else parse_solver(text, affine=True)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:  # NumPy's limit
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2**32 - 1")
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
