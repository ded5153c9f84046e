"""The comparison with other libraries: it measures what it says, and a result that lies is found out."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
NAMES = ("options", "problems", "reporting", "measure", "plots", "peer_solvers", "peers")


@pytest.fixture(scope="module")
def modules():
    """The modules of benchmarks/, which is no package; taken out of sys.modules again."""
    before = {name: sys.modules.get(name) for name in NAMES}
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(FOLDER))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def test_same_problem_same_rule(modules, tmp_path, capsys):
    arguments = ["--quick", "--problem", "tanh_easy", "--problem", "ifpn", "--rtol", "1e-3", "--repeats", "1"]
    rows = modules["peers"].main([*arguments, "--out", str(tmp_path / "out")])
    found = {(row.library, row.solver, row.problem): row for row in rows}
    assert {row.library for row in rows} >= {"deqkit", "scipy"}
    for row in rows:
        assert row.solved == (row.residual <= 1.05e-3) and row.seconds > 0
        assert 1 <= row.calls <= 201 and not row.is_wrong
    for name in ("fixed_point", "anderson", "broyden"):
        assert found["deqkit", name, "tanh_easy"].solved and found["deqkit", name, "ifpn"].solved
    ours = found["deqkit", "anderson", "tanh_easy"]
    assert ours.calls <= found["deqkit", "fixed_point", "tanh_easy"].calls
    out = capsys.readouterr().out
    assert "Failures reported as success: 0" in out and "in geometric mean" in out
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
    liar, loser = peers.compare(problem, torch.float32, [1e-3], both, 0, lambda: None)
    assert liar.is_wrong and (liar.calls, liar.claims) == (1, "yes")
    assert not loser.is_wrong and (loser.calls, loser.claims) == (3, "-")
    assert liar.residual == pytest.approx(1.0) and "wrong" in peers.calls_table([liar])


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
    packed = modules["peers"].Packed(modules["problems"].build("ifpn", small=True))
    x = torch.randn_like(packed.x0)
    assert torch.equal(packed.pack(packed.unpack(x)), x)
    levels = packed.problem.f(packed.unpack(x))
    assert torch.equal(packed.f(x), packed.pack(levels))
