"""The comparison with other libraries: it measures what it says, and a result that lies is found out."""

import csv
import json
import math
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from benchmark_modules import benchmark_modules

NAMES = (
    "options", "problems", "reporting", "measure", "plots", "peak_memory", "peer_solvers", "peer_solves",
    "peer_adjoints", "peer_gradients", "peer_targets", "peer_tables", "peer_plots", "peers",
)  # fmt: skip


@pytest.fixture(scope="module")
def modules():
    """The modules of the benchmark, taken out of sys.modules again."""
    before = {name: sys.modules.get(name) for name in NAMES}
    try:
        with benchmark_modules(*NAMES) as found:
            yield found
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def test_same_problem_same_rule(modules, tmp_path, capsys):
    arguments = ["--quick", "--part", "solve", "--problem", "tanh_easy", "--problem", "conv", "--rtol", "1e-3"]
    arguments += ["--library", "scipy", "--library", "torchdeq"]
    rows, _ = modules["peers"].main([*arguments, "--repeats", "1", "--out", str(tmp_path / "out")])
    found = {(row.library, row.solver, row.problem): row for row in rows}
    assert {row.library for row in rows} >= {"deqkit", "scipy"}
    for row in rows:
        assert row.solved == (row.residual <= 1.05e-3) and row.solved == (row.seconds > 0)
        assert 1 <= row.calls <= 201 and not row.is_wrong
        assert row.memory > row.call_memory >= 1
    for name in ("fixed_point", "anderson", "broyden"):
        assert found["deqkit", name, "tanh_easy"].solved and found["deqkit", name, "conv"].solved
    ours = found["deqkit", "anderson", "tanh_easy"]
    assert ours.calls <= found["deqkit", "fixed_point", "tanh_easy"].calls
    assert ours.memory > found["deqkit", "fixed_point", "tanh_easy"].memory + ours.calls  # its history
    out = capsys.readouterr().out
    assert "Failures reported as success: 0" in out and "Targets" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"peers.csv", "peers.json", "peers.png"}


def test_a_liar_and_a_loser(modules):
    """One solver claims success where there is none, one gives up without a word; calls are counted from outside."""
    peers, solvers = modules["peers"], modules["peer_solvers"]

    def lie(f, x0, rtol, max_calls):
        f(x0)
        return solvers.Outcome(x0, True)

    def lose(f, x0, rtol, max_calls):
        for _ in range(3):
            f(x0)
        return solvers.Outcome(x0, None)

    problem = modules["problems"].build("linear", small=True)
    both = [solvers.Peer("a", "liar", lie), solvers.Peer("b", "loser", lose)]
    liar, loser = peers.compare(problem, torch.float32, [1e-3], both, 0, lambda n: None)
    assert liar.is_wrong and (liar.calls, liar.claims) == (1, "yes")
    assert not loser.is_wrong and (loser.calls, loser.claims) == (3, "-")
    assert liar.residual == pytest.approx(1.0) and "wrong" in peers.calls_table([liar])


def test_memory_is_what_a_solver_keeps(modules):
    """To the byte: m states, in tensors or in arrays; what is released counts as long as it was there."""
    solvers, compare = modules["peer_solvers"], modules["peer_solves"].compare

    def keeping(m, copy):
        def run(f, x0, rtol, max_calls):
            kept = [copy(x0) for _ in range(m)]
            return solvers.Outcome(x0 if kept else x0, None)

        return run

    def releasing(f, x0, rtol, max_calls):
        for m in (3, 8, 5):
            kept = [x0.clone() for _ in range(m)]
            del kept
        return solvers.Outcome(f(x0), None)

    peers = [
        solvers.Peer("a", "nine", keeping(9, torch.clone)),
        solvers.Peer("a", "ninety", keeping(90, torch.clone)),
        solvers.Peer("a", "eight", releasing),
        solvers.Peer("a", "arrays", keeping(40, lambda x: x.numpy().copy()), keeps="numpy"),
        solvers.Peer("a", "hidden", keeping(9, torch.clone), keeps="jax"),
    ]
    problem = modules["problems"].build("linear", small=True)
    nine, ninety, eight, arrays, hidden = compare(problem, torch.float32, [1e-3], peers, 0, lambda n: None)
    assert (nine.memory, ninety.memory, eight.memory) == (9, 90, 8) and 1 <= nine.call_memory <= 3
    assert 40 <= arrays.memory < 60  # and some objects of Python
    assert math.isnan(hidden.memory)
    table = modules["peer_tables"].memory_table([nine, hidden])
    assert "one call of f" in table and "(9)" in table and "(?)" in table


def test_ours_keeps_two_states_a_step_and_theirs_allots_all_at_once(modules):
    """What is known of the implementations shows: plain iteration does not grow with its steps, Anderson does."""
    solves = modules["peer_solves"]
    peers = [peer for peer in modules["peer_solvers"].all_peers() if peer.label.split()[0] in ("deqkit", "torchdeq")]
    problem = modules["problems"].build("tanh_easy", small=True)
    with torch.no_grad():
        rows = solves.compare(problem, torch.float32, [1e-2, 1e-5], peers, 0, lambda n: None)
    memory = {(row.library, row.solver, row.rtol): row for row in rows}
    coarse, fine = (memory["deqkit", "fixed_point", rtol] for rtol in (1e-2, 1e-5))
    assert coarse.calls < fine.calls and abs(fine.memory - coarse.memory) < 2
    coarse, fine = (memory["deqkit", "anderson", rtol] for rtol in (1e-2, 1e-5))
    assert fine.memory - coarse.memory >= 1.5 * (fine.calls - coarse.calls)
    if ("torchdeq", "broyden", 1e-2) in memory:  # two states for each of 200 steps, whatever it takes
        assert memory["torchdeq", "broyden", 1e-2].memory > 2 * (solves.MAX_CALLS - 1)


def test_a_solver_without_the_rule_is_stopped_by_it(modules):
    """The point handed out is the first that f was asked for and that meets the rule."""
    solvers = modules["peer_solvers"]
    seen = []

    def f(x):
        return 0.5 * x + 1

    def solve(g):
        x = g.x0
        while True:
            seen.append(x)
            x = g(x)

    outcome = solvers._stopped(solve)(f, torch.zeros(2, 3), 1e-2, 50)
    assert torch.equal(outcome.x, seen[-1])
    ratios = [((f(x) - x).norm(dim=1) / f(x).norm(dim=1)).max().item() for x in seen]
    assert ratios[-1] <= 1e-2 and all(ratio > 1e-2 for ratio in ratios[:-1])
    seen.clear()
    stopped = solvers._stopped(solve)(f, torch.zeros(2, 3), 1e-9, 5)
    assert len(seen) == 5 and torch.equal(stopped.x, seen[-1])


def test_packing_keeps_the_problem(modules):
    packed = modules["peer_solves"].Packed(modules["problems"].build("ifpn", small=True))
    x = torch.randn_like(packed.x0)
    assert torch.equal(packed.pack(packed.unpack(x)), x)
    levels = packed.problem.f(packed.unpack(x))
    assert torch.equal(packed.f(x), packed.pack(levels))


def test_jaxopt(modules):
    pytest.importorskip("jaxopt")
    peers = [peer for peer in modules["peer_solvers"].all_peers() if peer.library in ("jaxopt", "deqkit")]
    for dtype, rtol in ((torch.float32, 1e-3), (torch.float64, 1e-8)):
        problem = modules["problems"].build("tanh_easy", small=True, dtype=dtype)
        with torch.no_grad():
            rows = modules["peer_solves"].compare(problem, dtype, [rtol], peers, 1, lambda n: None)
        found = {row.solver: row for row in rows}
        assert found["FixedPointIteration"].solved and found["AndersonAcceleration"].solved
        assert found["FixedPointIteration"].calls == found["fixed_point"].calls


@pytest.fixture(scope="module")
def tasks(modules):
    """A problem whose exact gradient comes from a dense solve, and one with GMRES's."""
    build = modules["problems"].build
    return {name: modules["peer_gradients"].Task(build(name, small=True), seed=1) for name in ("tanh_easy", "conv")}


@pytest.mark.parametrize("name", ["tanh_easy", "conv"])
def test_the_exact_gradient_is_that_of_many_steps(modules, tasks, name):
    task = tasks[name]
    layer = modules["peer_gradients"].Layer(task.packed, task.problem.exact_f)
    x = task.packed.pack(task.problem.solution)
    for _ in range(150):
        x = layer(x)
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    unrolled = torch.autograd.grad(x, list(layer.parameters()), g)
    expected = modules["peer_gradients"].flat(unrolled)
    assert (task.exact - expected).norm() < 1e-9 * expected.norm()
    assert len(task.tensors) == len(list(layer.parameters())) >= 3


def adjoint_of(modules, run, exact=True):
    return modules["peer_adjoints"].PeerAdjoint("a", "adjoint", run, exact)


def test_a_wrong_gradient_is_counted_unless_something_warns(modules, tasks):
    task = tasks["tanh_easy"]

    def one_step(layer, x0, rtol, max_calls):
        with torch.no_grad():
            for _ in range(60):
                x0 = layer(x0)
        return layer(x0)

    def warned(*args):
        warnings.warn("the adjoint solve did not converge", stacklevel=1)
        return one_step(*args)

    def muttering(*args):
        warnings.warn("this name will change", stacklevel=1)
        return one_step(*args)

    def lost(*args):
        return one_step(*args) * math.nan

    def failing(layer, x0, rtol, max_calls):
        raise ArithmeticError("no way\nto go on")

    adjoints = [adjoint_of(modules, run) for run in (one_step, warned, muttering, lost, failing)]
    adjoints.append(adjoint_of(modules, one_step, exact=False))
    compare = modules["peer_gradients"].compare_gradients
    rows = compare(task, torch.float32, 1e-5, adjoints, 0, lambda n: None)
    assert [row.is_wrong for row in rows] == [True, False, True, True, False, False]
    wrong, _, _, _, failed, approximate = rows
    assert 0.1 < wrong.relative_error < 1 and 0.5 < wrong.cosine < 0.99 and wrong.residual < 1e-5
    assert (wrong.calls, wrong.calls_backward, wrong.passes) == (61, 0, 1)
    assert failed.failure == "ArithmeticError: no way" and failed.warned
    table = modules["peer_tables"].gradients_table(rows)
    assert table.count("WRONG") == 3 and table.count("failed") == 1 and table.count("approximate") == 1
    assert approximate.relative_error == wrong.relative_error


def test_backward_passes_and_memory_are_those_of_the_steps(modules, tasks):
    """An unrolled loop of k steps: k passes; twice the calls with checkpoints; memory in proportion to k."""
    task = tasks["conv"]

    def unrolled(k, checkpoint):
        def run(layer, x0, rtol, max_calls):
            for _ in range(k):
                x0 = torch.utils.checkpoint.checkpoint(layer, x0, use_reentrant=False) if checkpoint else layer(x0)
            return x0

        return adjoint_of(modules, run)

    adjoints = [unrolled(10, False), unrolled(40, False), unrolled(40, True)]
    rows = modules["peer_gradients"].compare_gradients(task, torch.float32, 1e-5, adjoints, 1, lambda n: None)
    assert [(row.calls, row.calls_backward, row.passes) for row in rows] == [(10, 0, 10), (40, 0, 40), (80, 40, 40)]
    ten, forty, checkpoints = (row.memory for row in rows)
    assert 3 < forty / ten < 4.2 and 40 < checkpoints < 0.6 * forty
    assert all(row.seconds > 0 and row.ratio > 0 for row in rows)
    assert rows[1].relative_error < 1e-3 < rows[0].relative_error


def test_every_adjoint_meets_its_claim_on_an_easy_problem(modules, tmp_path, capsys):
    arguments = ["--quick", "--part", "gradients", "--problem", "tanh_easy", "--calls-only", "--markdown"]
    _, rows = modules["peers"].main([*arguments, "--out", str(tmp_path)])
    found = {(row.library, row.adjoint): row for row in rows}
    for row in rows:
        assert not row.failure and not row.warned and not row.is_wrong and row.memory > 1
        assert math.isnan(row.seconds)
        assert row.relative_error < 1e-3 if row.exact else 5e-3 < row.relative_error < 1
    assert found["deqkit", "implicit (gmres)"].passes < found["deqkit", "implicit (fixed_point)"].passes
    assert found["deqkit", "jfb"].passes == 1 and found["deqkit", "neumann, 5 terms"].passes == 5
    assert found["deqkit", "unrolled"].memory > 3 * found["deqkit", "reversible"].memory
    out = capsys.readouterr().out
    assert "| --- |" in out and "Wrong gradients without a warning: 0" in out
    with (tmp_path / "gradients.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["adjoint"] for line in lines] == [row.adjoint for row in rows]
    record = json.loads((tmp_path / "peers.json").read_text())
    assert len(record["gradients"]) == len(rows) and record["versions"]["torch"] and not record["solves"]
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_targets_are_judged_by_the_figures(modules):
    solves, target = modules["peer_solves"], modules["peer_targets"]

    def row(problem, library, solver, calls, seconds, solved=True, rtol=1e-5):
        residual = 0.5 * rtol if solved else 1.0
        return solves.SolveRow(
            problem, library, solver, "float32", rtol, calls, residual, solved, "-", seconds, 1.3, 5.0, 2.0
        )

    rows = [
        row("tanh_easy", "deqkit", "anderson", 20, 0.1), row("tanh_easy", "deqkit", "fixed_point", 10, 0.2),
        row("tanh_easy", "torchdeq", "broyden", 40, 0.4), row("tanh_easy", "scipy", "anderson", 25, 0.01),
        row("conv", "deqkit", "anderson", 20, 0.1), row("conv", "torchdeq", "broyden", 10, 0.1, solved=False),
        row("mixed_batch", "deqkit", "anderson", 20, 0.2, rtol=1e-4),
        row("mixed_batch", "torchdeq", "anderson", 20, 0.5, rtol=1e-4),
        row("mixed_batch", "torchdeq", "broyden", 20, 1.0, rtol=1e-4),
    ]  # fmt: skip
    lines = {line.what: line for line in target.targets(rows)}
    assert lines["time / bare calls, tanh_easy, anderson"].met and not lines["time / bare calls, conv, anderson"].met
    assert lines["time / bare calls, ifpn_wide, anderson"].met is None
    calls = "calls to 1e-05, {} solver / best other, {}"
    worst, mean = (lines[calls.format("default", what)] for what in ("worst", "mean"))
    assert (worst.figure, worst.met, mean.figure, mean.met) == (0.8, True, pytest.approx(0.8), False)
    assert "solved by deqkit alone: conv" in mean.note
    assert lines[calls.format("best", "mean")].figure == pytest.approx(0.4)
    assert lines["time to 1e-05, default solver / torchdeq's best, worst"].figure == 0.25
    mixed = lines["time to 0.0001, mixed_batch, default solver / torchdeq's best"]
    assert mixed.figure == 0.4 and not mixed.met

    lost = [replace(r, solved=False) if r.library == "deqkit" else replace(r, solved=True) for r in rows]
    lines = {line.what: line for line in target.targets(lost)}
    worst, mean = (lines[calls.format("default", what)] for what in ("worst", "mean"))
    assert (worst.figure, mean.figure) == (math.inf, math.inf) and worst.met is mean.met is False
    assert {line.met for line in target.targets([])} == {None}
    table = modules["peer_tables"].targets_table(list(lines.values()))
    assert "missed" in table and "not measured" in table


def test_large_problems_are_right(modules):
    problems = modules["problems"]
    for name in problems.LARGE_PROBLEMS:
        problem = problems.build(name, small=True, seed=2)
        assert problem.relative_residual(problem.solution).max() < 1e-12


def test_the_default_plan_covers_the_targets(modules):
    peers = modules["peers"]
    plan = peers.plan_solves(peers.parse_arguments([]), modules["peer_solvers"].all_peers())
    planned = {(part.problem, part.rtol) for part in plan if part.dtype == torch.float32}
    assert planned >= {(name, 1e-5) for name, _ in modules["peer_targets"].OVERHEADS} | {("mixed_batch", 1e-4)}
    with_memory = {(part.dtype, part.rtol) for part in plan if part.memory}
    assert with_memory == {(torch.float32, 1e-5)}  # one tolerance tells, and each takes its time
    other = peers.plan_solves(peers.parse_arguments(["--dtype", "float64"]), modules["peer_solvers"].all_peers())
    assert {(part.dtype, part.rtol, part.memory) for part in other} == {(torch.float64, 1e-10, True)}
