"""The benchmarks: problems whose answers are right, and files that say what was measured."""

import argparse
import csv
import json
import subprocess
import sys
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from benchmark_modules import BENCHMARKS, benchmark_modules
from PIL import Image

import deqkit

SCRIPT = BENCHMARKS / "solver_iters.py"


@pytest.fixture(scope="module")
def modules():
    """The benchmarks' modules."""
    names = ("problems", "options", "measure", "solver_iters", "warm_start", "stability", "mixed_precision")
    with benchmark_modules(*names) as found:
        yield found


def run_script(*arguments, cwd):
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


NAMES = [
    "tanh_easy",
    "tanh_hard",
    "tanh_expanding",
    "linear",
    "linear_symmetric",
    "mixed",
    "conv",
    "ifpn",
    "ifpn_grown",
]


def test_every_problem_is_tested(modules):
    assert list(modules["problems"].PROBLEMS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_solutions_are_right(modules, name):
    problem = modules["problems"].build(name, small=True, seed=3)
    assert problem.relative_residual(problem.solution).max() < 1e-12
    assert problem.relative_error(problem.solution).max() == 0
    # f in the working dtype is the same map: at x* it moves by rounding only.
    leaves = torch.utils._pytree.tree_leaves(problem.x0)
    assert all(leaf.dtype == torch.float32 for leaf in leaves)
    rounded = torch.utils._pytree.tree_map(lambda x: x.float(), problem.solution)
    assert problem.relative_error(problem.f(rounded)).max() < 1e-5
    assert problem.relative_error(problem.x0).min() > 0.9
    assert 0.2 < problem.radius < 1.2


def test_solution_of_the_mixed_batch_solves_its_linear_systems(modules):
    problem = modules["problems"].build("mixed", small=True)
    weight, bias, scale = (t.numpy() for t in (problem.exact_f.weight, problem.exact_f.bias, problem.exact_f.scale))
    assert scale[0, 0] == pytest.approx(0.1) and scale[-1, 0] == pytest.approx(0.999)
    for i in range(problem.num_samples):
        expected = np.linalg.solve(np.eye(len(weight)) - scale[i, 0] * weight, bias[i])
        np.testing.assert_allclose(problem.solution[i].numpy(), expected, rtol=1e-9, atol=1e-11)


def test_the_radius_of_a_symmetric_problem_is_that_of_its_weight(modules):
    problem = modules["problems"].build("linear_symmetric", small=True)
    assert problem.radius == pytest.approx(0.99, abs=1e-3)


def test_problems_are_seeded_and_leave_the_global_generator_alone(modules):
    build = modules["problems"].build
    torch.manual_seed(0)
    first = build("conv", small=True, seed=1)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))
    assert torch.equal(first.solution, build("conv", small=True, seed=1).solution)
    assert not torch.equal(first.solution, build("conv", small=True, seed=2).solution)


def test_a_wrong_solution_is_refused(modules, monkeypatch):
    problems = modules["problems"]
    draft = problems.PROBLEMS["linear"](True)
    wrong = replace(draft, solve=lambda f, x: draft.solve(f, x) + 1e-9)
    monkeypatch.setitem(problems.PROBLEMS, "linear", lambda small: wrong)
    with pytest.raises(problems.ProblemError, match="linear: the reference solution has a relative residual of"):
        problems.build("linear")


def test_a_solution_among_many_is_refused(modules, monkeypatch):
    problems = modules["problems"]
    draft = problems._Draft("every point", torch.nn.Identity(), torch.ones(2, 5), lambda f, x: x)
    monkeypatch.setitem(problems.PROBLEMS, "identity", lambda small: draft)
    with pytest.raises(problems.ProblemError, match="identity: two starting points"):
        problems.build("identity")


def is_solver(value):
    return isinstance(value, type) and issubclass(value, deqkit.Solver) and value is not deqkit.Solver


@pytest.mark.parametrize("name", NAMES)
def test_solvers_of_affine_equations_are_offered_where_they_are_right(modules, name):
    problem = modules["problems"].build(name, small=True)
    tree_map = torch.utils._pytree.tree_map
    shift = tree_map(lambda x: 0.1 * torch.ones_like(x), problem.solution)
    here, there = problem.solution, tree_map(lambda x: 0.5 * torch.ones_like(x), problem.solution)
    moved = [
        tree_map(torch.sub, problem.exact_f(tree_map(torch.add, x, shift)), problem.exact_f(x)) for x in (here, there)
    ]
    pairs = zip(*map(torch.utils._pytree.tree_leaves, moved), strict=True)
    is_affine = all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs)
    assert is_affine == (name in modules["solver_iters"].AFFINE)


def test_every_solver_can_be_measured(modules, tmp_path, capsys):
    solvers = ["gmres", "bicgstab", "newton_krylov", "reversible", "auto", "anderson:history=2"]
    arguments = ["--only", "problems", "--quick", "--problem", "linear", "--steps", "0,40", "--out", str(tmp_path)]
    assert modules["solver_iters"].main([*arguments, *(word for name in solvers for word in ("--solver", name))]) == 0
    with (tmp_path / "solver_iters.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["solver"] for row in rows[::2]] == solvers  # and no others
    assert all(
        float(last["error_median"]) < 0.5 * float(first["error_median"])
        for first, last in zip(rows[::2], rows[1::2], strict=True)
    )
    assert "auto: in a fixed number of steps it stays with its first solver, Anderson(" in capsys.readouterr().out


def test_options(modules):
    options = modules["options"]
    named = options.parse_solver("anderson:history=20,mixing=0.5")
    assert named.label == "anderson:history=20,mixing=0.5"
    assert (named.solver.history, named.solver.mixing) == (20, 0.5)
    assert options.parse_steps("7,0-3, 30") == [0, 1, 2, 3, 7, 30]
    assert options.parse_solver("newton_krylov:history=5").solver == deqkit.NewtonKrylov(history=5)
    assert options.parse_solver("gmres", affine=True).solver == deqkit.GMRES()
    assert [cls.name for cls in vars(deqkit).values() if is_solver(cls) and cls.name not in options.SOLVERS] == []
    for text, message in [
        ("newton", "unknown solver 'newton'"),
        ("gmres", "gmres solves equations affine in x alone: choose from fixed_point, "),
        ("anderson:memory=3", "anderson has no setting 'memory': choose from .*history"),
        ("anderson:history=0", "history must be at least 1"),
        ("anderson:history=x", "history=x"),
    ]:
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            options.parse_solver(text)
    for text in ("", "3-1", "a", "-1"):
        with pytest.raises(argparse.ArgumentTypeError):
            options.parse_steps(text)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Output folder and finished process of one quick run."""
    folder = tmp_path_factory.mktemp("quick")
    solvers = [f"--solver={name}" for name in ("fixed_point", "anderson", "broyden", "anderson:history=2")]
    process = run_script("--quick", "--threads", "1", *solvers, "--out", folder / "out", cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder / "out", process


def test_quick_run_writes_consistent_figures(modules, quick):
    folder, _ = quick
    with (folder / "solver_iters.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in fields(modules["measure"].Row)]
    assert list(dict.fromkeys(row["problem"] for row in rows)) == NAMES
    labels = ["fixed_point", "anderson", "broyden", "anderson:history=2"]
    steps = [*range(11), 15, 20]
    assert len(rows) == len(NAMES) * len(labels) * len(steps)
    for name in NAMES:
        for label in labels:
            mine = [row for row in rows if (row["problem"], row["solver"]) == (name, label)]
            assert [int(row["steps"]) for row in mine] == steps
            assert [int(row["calls"]) for row in mine] == [k + 1 for k in steps]
            worst = [float(row["residual_worst"]) for row in mine]
            assert all(b <= a * 1.001 for a, b in pairwise(worst)), "the best point visited cannot get worse"
            error = [float(row["error_median"]) for row in mine]
            assert error[0] == pytest.approx(1)  # x0 = 0
            assert error[-1] < 0.6
            assert all(float(row["error_worst"]) >= float(row["error_median"]) for row in mine)
            assert all(float(row["seconds"]) > 0 and float(row["overhead"]) > 0.3 for row in mine)
    assert all(row["residual_confirmed"] == "True" for row in rows)


def test_quick_run_plots_every_problem(quick):
    folder, _ = quick
    pixels = np.asarray(Image.open(folder / "solver_iters.png").convert("RGB"))
    height, width = pixels.shape[:2]
    assert width > 1000 and height > 1000
    # Every panel holds curves: coloured pixels, as opposed to the grey of text, frames and grid.
    coloured = np.ptp(pixels.astype(int), axis=2) > 80
    for band in np.array_split(coloured[height // 20 : -height // 12], 3, axis=0):
        for panel in np.array_split(band, 3, axis=1):
            assert panel.sum() > 500


def test_quick_run_says_what_it_ran_on_and_found(quick):
    folder, process = quick
    record = json.loads((folder / "solver_iters.json").read_text())
    assert record["hardware"]["threads"] == 1 and record["hardware"]["cpu"]
    assert record["versions"]["torch"] and record["versions"]["deqkit"]
    assert record["seed"] == 0 and "--quick" in record["command"]
    assert list(record["problems"]) == NAMES
    out = process.stdout
    assert record["hardware"]["cpu"] in out and "best point visited" in out
    assert "agree with float64 ones of the value returned: 468 of 468" in out
    assert "How many steps does i-FPN need?" in out  # the second part
    assert len(out.splitlines()) < 250
    assert {path.name for path in folder.iterdir()} == {
        f"{part}.{kind}" for part in ("solver_iters", "detector") for kind in ("csv", "json", "png")
    }


def test_a_solve_that_lies_about_its_residual_is_found_out(modules, monkeypatch):
    measure, problem = modules["measure"], modules["problems"].build("linear", small=True)
    solve = measure.deqkit.solve

    def flattering(*args, **kwargs):
        solution = solve(*args, **kwargs)
        return replace(solution, relative_residual=solution.relative_residual / 2)

    solvers = modules["options"].default_solvers()[:1]
    assert all(row.residual_confirmed for row in measure.measure(problem, solvers, [0, 5], 1, lambda: None))
    monkeypatch.setattr(measure.deqkit, "solve", flattering)
    assert not any(row.residual_confirmed for row in measure.measure(problem, solvers, [0, 5], 1, lambda: None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--steps", "3-1"], "names no step count"),
        (["--device", "gpu7"], "device 'gpu7' cannot be used"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--repeats", "0"], "'0' is not a positive integer"),
        (["--data", "somewhere"], "--data belongs to --detector"),
        (["--only", "detector", "--detector", str(SCRIPT), "--quick"], "--quick does not go with --only detector"),
        (["--only", "detector", "--problem", "linear"], "--problem does not go with --only detector"),
        (["--only", "problems", "--images", "3"], "--images does not go with --only problems"),
        (["--only", "problems", "--retrain"], "--retrain does not go with --only problems"),
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        (["--detector", str(SCRIPT), "--retrain"], "--retrain does not go with --detector"),
        (["--detector", str(SCRIPT), "--mixing", "1"], "--mixing does not go with --detector"),
        (["--mixing", "0"], "'0' is not a positive number"),
        (["--mixing", "a"], "'a' is not a positive number"),
        (["--seed", "-1"], "'-1' is not a number from 0"),
        (["--only", "problems", "--solver", "unroll"], "--solver unroll is the neck's"),
        (["--solver", "gmres"], "affine in x alone, i-FPN's G is not: --only problems --problem linear"),
        (["--only", "problems", "--solver", "bicgstab", "--problem", "conv"], "conv are not: --only problems"),
        (["--solver", "newton"], "unknown solver 'newton': choose from fixed_point, "),
        (["--out", str(SCRIPT / "out")], f"cannot write to {SCRIPT}"),
        (["--solver", "anderson:memory=3"], "has no setting 'memory'"),
        (["--steps", "x"], "not a list of step counts"),
        (["--problem", "nothing"], "invalid choice: 'nothing'"),
        (["--detector", "missing.ckpt"], "missing.ckpt"),
    ],
)
def test_unusable_arguments_end_in_one_clear_line(modules, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        modules["solver_iters"].main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# starting points


def test_warm_starts_save_steps_and_leave_the_training_alone(modules, tmp_path, capsys):
    assert modules["warm_start"].main(["--quick", "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "warm_start.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in fields(modules["warm_start"].Row)]
    by_start = {name: [row for row in rows if row["start"] == name] for name in modules["warm_start"].STARTS}
    assert all([row["epoch"] for row in mine] == ["1", "2", "3", "4"] for mine in by_start.values())

    def last(start, figure):
        return float(by_start[start][-1][figure])

    for start in by_start:
        assert last(start, "loss") == pytest.approx(last("zero", "loss"), rel=1e-2)
        assert last(start, "failed") == 0 and last(start, "worst_residual") <= 1e-4
    # In the first epoch no sample is known yet.
    assert by_start["cache"][0]["steps"] == by_start["zero"][0]["steps"]
    assert last("cache", "steps") < 0.9 * last("zero", "steps") and last("cache", "calls") < last("zero", "calls")
    assert last("cache", "test_steps") == pytest.approx(last("zero", "test_steps"), rel=0.02)
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[-6:-2]] == ["zero", "cache", "learned", "both"]
    record = json.loads((tmp_path / "out" / "warm_start.json").read_text())
    assert record["settings"]["quick"] and record["hardware"]["cpu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rtol", "2"], "'2' is not a tolerance between 0 and 1"),
        (["--start", "hot"], "invalid choice: 'hot'"),
        (["--solver", "newton"], "unknown solver 'newton'"),
        (["--threads", "0"], "'0' is not a positive integer"),
    ],
)
def test_unusable_arguments_of_warm_start(modules, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        modules["warm_start"].main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("solver", ["auto", "mixed_precision"])
def test_mixed_precision_refuses_solvers_in_stages(modules, solver, capsys):
    with pytest.raises(SystemExit):
        modules["mixed_precision"].main(["--small", "--problem", "conv", "--solver", solver])
    assert "--solver: MixedPrecision: solver must be a single one" in capsys.readouterr().err


def test_mixed_precision_counts_calls_by_their_precision(modules, tmp_path, capsys):
    mixed = modules["mixed_precision"]
    arguments = ["--small", "--problem", "conv", "--problem", "ifpn_large", "--repeats", "1", "--threads", "1"]
    assert mixed.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "mixed_precision.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in fields(mixed.Row)]
    assert [(row["problem"], float(row["rtol"])) for row in rows] == [
        (name, rtol) for name in ("conv", "ifpn_large") for rtol in mixed.TOLERANCES
    ]
    for row in rows:
        calls, low, full = (int(row[name]) for name in ("calls", "low_calls", "full_calls"))
        assert row["unsolved"] == "0" and 0 < full < calls <= low + full <= calls + 4
        assert (full == 1) == (float(row["rtol"]) > 0.05) or float(row["rtol"]) == 0.01
        costs = low * float(row["low_ms"]) + full * float(row["full_ms"])
        assert float(row["by_calls"]) == pytest.approx(costs / (calls * float(row["full_ms"])))
        assert float(row["by_clock"]) > 0
    assert capsys.readouterr().out.splitlines()[-3].split()[:2] == ["ifpn_large", "1e-05"]


def test_stability_measures_every_variant(modules, tmp_path, capsys):
    stability = modules["stability"]
    assert stability.main(["--steps", "5", "--every", "3", "--threads", "1", "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "stability.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["step"]) for row in rows] == [(v, s) for v in stability.TITLES for s in ("3", "5")]
    by_variant = {row["variant"]: row for row in rows if row["step"] == "5"}
    # All start from the same weights, and what is done about them shows at once.
    assert len({row["radius"] for row in by_variant.values()}) > 1
    assert all(0 < float(row["radius"]) < 2 and float(row["failed"]) == 0 for row in rows)
    assert (tmp_path / "out" / "stability.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(title in printed for title in stability.TITLES.values())
