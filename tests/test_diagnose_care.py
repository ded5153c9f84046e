"""deqkit.diagnose: states of every kind, what it leaves untouched, and its settings."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import warnings
from typing import Any

import numpy as np
import patients
import pytest
import torch
from equations import affine, matrix, tanh, tanh_layer
from patients import advice, failures, few, verdicts
from torch import Tensor, nn

import deqkit
from deqkit.adjoints import ADJOINTS
from deqkit.solvers import SOLVERS

# ---------------------------------------------------------------------------------------------------------------------
# states


def test_dict_state() -> None:
    layer = nn.Linear(4, 4)
    nn.init.orthogonal_(layer.weight, gain=0.5)

    def f(x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"b": 0.5 * x["a"] + 1, "a": torch.tanh(layer(x["b"]))}

    d = few(f, {"a": torch.zeros(2, 4), "b": torch.zeros(2, 4)})
    assert d.healthy and "3 numbers" not in d.state and "2 samples of 8 numbers in 2 tensors" in d.state
    assert d.adjoints[0].cosine is not None and d.check("stateless").verdict == "passed"


def test_complex_state() -> None:
    w = torch.full((3,), 0.5j, dtype=torch.complex64, requires_grad=True)
    d = deqkit.diagnose(
        lambda z: w * z + 0.1 * z.conj() + 1, torch.zeros(2, 3, dtype=torch.complex64), solvers=["anderson"]
    )
    assert d.healthy and d.spectrum is not None and d.spectrum.radius is not None and "complex64" in d.state
    assert d.spectrum.radius.tolist() == pytest.approx([(0.25 - 0.01) ** 0.5] * 2, rel=1e-2)
    assert d.adjoints and d.adjoints[0].relative_error is not None and d.adjoints[0].relative_error < 1e-3


def test_batch_dims() -> None:
    eq = tanh(6, 6, radius=0.8)
    a, b = (t.clone() for t in eq.args)
    d = deqkit.diagnose(tanh_layer, torch.zeros(6, dtype=torch.float64), args=(a, b[0]), batch_dims=0, adjoints=[])
    assert d.healthy and "one system of 6 numbers" in d.state and d.spectrum is not None
    assert verdicts(d)["independent samples"] == "skipped"
    assert d.spectrum.radius is not None and d.spectrum.radius.shape == ()
    x0 = torch.zeros(2, 3, 6, dtype=torch.float64)
    d = deqkit.diagnose(tanh_layer, x0, args=(a, b.reshape(2, 3, 6)), batch_dims=2, adjoints=[])
    assert d.healthy and d.spectrum is not None and d.spectrum.radius is not None and d.spectrum.radius.shape == (2, 3)
    assert d.solvers[0].status is not None and d.solvers[0].status.shape == (2, 3)
    assert d.check("independent samples").evidence["left_out"] is not None
    bad = x0.clone()
    bad[1, 2] = torch.nan
    assert "sample (1, 2)" in few(tanh_layer, bad, args=(a, b.reshape(2, 3, 6)), batch_dims=2).check("finite").finding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    b = patients.draw(3, 8, seed=0).to(dtype)
    d = few(lambda x: torch.tanh(0.5 * x.flip(1) + b), torch.zeros(3, 8, dtype=dtype), rtol=1e-2)
    assert d.healthy and verdicts(d)["derivative"] == "skipped"


def test_under_autocast_no_grad_and_inference_mode() -> None:
    f, x0, args = patients.healthy()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert deqkit.diagnose(f, x0, args=args, rtol=2e-2, solvers=["anderson"]).healthy
    with torch.no_grad():
        assert few(f, x0, args=args).adjoints
    with torch.inference_mode():
        assert few(f, torch.zeros(4, 12), args=args).check("differentiable").verdict == "passed"


def test_a_graph_of_the_callers_is_left_whole() -> None:
    f, x0, args = patients.healthy()
    encoder = nn.Linear(12, 12)
    features = torch.sin(encoder(args[0]))
    few(lambda x: f(x, features) * encoder.bias.exp(), x0)
    few(f, x0, args=(features,))
    features.sum().backward()
    assert encoder.weight.grad is not None


# ---------------------------------------------------------------------------------------------------------------------
# leaving things as they were


def test_nothing_is_touched() -> None:
    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = patients.Cell(patients.contraction(), nn.BatchNorm1d(12))
            self.drop = nn.Dropout(0.1).eval()
            self.register_buffer("count", torch.zeros(1))
            self.register_buffer("nothing", None)

        def forward(self, x: Tensor, b: Tensor) -> Tensor:
            warnings.warn("mind the gap", stacklevel=2)
            self.count = self.count + 1
            b.mul_(1.01)
            self.eval()
            return self.cell(x, b) + 0 * torch.rand(1) * random.random() * np.random.rand()

    f, x0, args = Everything(), torch.zeros(4, 12, requires_grad=True), (patients.draw(4, 12, seed=1),)
    f.cell.linear.bias.requires_grad_(False)
    f.cell.linear.weight.grad = torch.ones(12, 12)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = copy.deepcopy(dict(f.state_dict())), args[0].clone(), [m.training for m in f.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = deqkit.diagnose(f, x0, args=args, max_steps=8)
        assert np.array_equal(np.random.get_state()[1], states[2])  # pyright: ignore
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert {"keeps x"} == set(failures(found))
    assert all(torch.equal(f.state_dict()[k], v) for k, v in before[0].items())
    assert torch.equal(args[0], before[1]) and [m.training for m in f.modules()] == before[2]
    assert f.nothing is None and x0.grad is None and x0.requires_grad and not bool(x0.any())
    assert torch.equal(f.cell.linear.weight.grad, torch.ones(12, 12)) and f.cell.linear.bias.grad is None
    assert not f.cell.linear.bias.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in f.modules())


@pytest.mark.parametrize("make", [patients.stochastic, patients.coupled, patients.healthy])
def test_the_same_twice_and_nothing_left_behind(make: Any) -> None:
    f, x0, args = make()
    before, state = copy.deepcopy(f.state_dict()), torch.get_rng_state()
    first, second = (deqkit.diagnose(f, x0, args=args, max_steps=15) for _ in range(2))
    assert all(torch.equal(v, before[k]) for k, v in f.state_dict().items()) and f.training
    assert torch.equal(torch.get_rng_state(), state)
    assert first.recommendations == second.recommendations and first.num_fn_evals == second.num_fn_evals
    assert all(p.grad is None for p in f.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in f.modules())


def test_tensors_of_the_callers_get_no_hooks() -> None:
    features = torch.ones(2, 3, requires_grad=True) * 2
    few(lambda x: features, torch.zeros(2, 3))
    assert not features._backward_hooks


def test_eval_mode_is_tried_and_left_again() -> None:
    f, x0, args = patients.coupled()
    modes: list[bool] = []
    f.register_forward_pre_hook(lambda module, args: modes.append(module.training))  # pyright: ignore
    deqkit.diagnose(f, x0, args=args, max_steps=8)
    assert False in modes and modes[0] and modes[-1] and len(f._forward_pre_hooks) == 1  # pyright: ignore


def test_the_count_of_calls_is_true_and_bounded() -> None:
    f, x0, args = patients.expanding()
    calls: list[int] = []

    def counted(x: Tensor, b: Tensor) -> Tensor:
        calls.append(1)
        return f(x, b)

    for max_steps in (4, 16):
        calls.clear()
        d = deqkit.diagnose(counted, x0, args=args, max_steps=max_steps)
        assert d.num_fn_evals == len(calls) and f"f called {len(calls)} times" in str(d)
        assert d.num_fn_evals <= 40 + (len(d.solvers) + 2) * (max_steps + 4) + 4 * len(d.adjoints)
        assert 0 < d.num_products <= 60 * max_steps + 100 and d.seconds > 0


def test_modules_are_found_wherever_they_hide() -> None:
    from deqkit.diagnosis.modules import modules_of

    net = nn.Linear(2, 2)

    class Callable_:
        def __init__(self) -> None:
            self.inner = net

        def __call__(self, x: Tensor) -> Tensor:
            return self.inner(x)

        def method(self, x: Tensor) -> Tensor:
            return self.inner(x)

    def closure(x: Tensor) -> Tensor:
        return net(x)

    def nested(x: Tensor) -> Tensor:
        return [closure(y) for y in [x]][0]

    nets = {"a": [net]}
    ways: list[Any] = [
        net, net.forward, closure, nested, lambda x: nets["a"][0](x), Callable_(), Callable_().method,
        functools.partial(lambda m, x: m(x), net), lambda x, m=net: m(x), lambda x: GLOBAL(x),
    ]  # fmt: skip
    for way in ways:
        assert any(found is net or found is GLOBAL for found in modules_of(way).values()), way
    assert list(modules_of(lambda x, m: m(x), (net,))) == ["args[0]"] and not modules_of(torch.relu)


GLOBAL = nn.Linear(2, 2)


# ---------------------------------------------------------------------------------------------------------------------
# settings


@pytest.mark.parametrize(
    "settings, error, says",
    [
        ({"args": torch.ones(2)}, TypeError, "args must be a tuple"),
        ({"solvers": "anderson"}, TypeError, "solvers must be a list"),
        ({"solvers": ["picard"]}, ValueError, "unknown solver 'picard'"),
        ({"adjoints": ["exact"]}, ValueError, "unknown adjoint 'exact'"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1"),
        ({"batch_dims": -1}, ValueError, "batch_dims must be at least 0"),
        ({"rtol": 0.0}, ValueError, "nothing to converge to"),
        ({"rtol": -1.0}, ValueError, "rtol must be finite"),
        ({"norm": "l7"}, ValueError, "unknown norm"),
        ({"x0": torch.zeros(0, 3)}, ValueError, "no sample to examine"),
        ({"x0": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "floating or complex"),
        ({"f": 3}, TypeError, "f must be callable"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        deqkit.diagnose(**{"f": lambda x: x, "x0": torch.zeros(2, 3)} | settings)


def test_solves_use_the_norm_and_the_tolerances() -> None:
    f, x0, args = patients.healthy()
    seen: list[int] = []

    def norm(x: Tensor) -> Tensor:
        seen.append(1)
        return x.abs().amax(dim=1)

    loose, tight = (few(f, x0, args=args, rtol=rtol, norm=norm) for rtol in (1e-2, 1e-5))
    assert seen and loose.best is not None and tight.best is not None
    assert loose.best.num_fn_evals < tight.best.num_fn_evals
    absolute = few(f, x0, args=args, rtol=0.0, atol=1e-3)
    assert absolute.healthy and absolute.adjoints[0].cosine is not None


def test_copies_and_pickles() -> None:
    f, x0, args = patients.healthy()
    d = few(f, x0, args=args)
    again = pickle.loads(pickle.dumps(d))
    assert str(again) == str(d) == str(copy.deepcopy(d)) == repr(d)
    with pytest.raises(AttributeError):
        d.notes = ()  # pyright: ignore
    with pytest.raises(KeyError, match="no check 'speed'"):
        d.check("speed")


def test_an_unrolled_solve_that_would_take_too_much_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from deqkit.diagnosis import trials

    f, x0, args = patients.healthy()
    monkeypatch.setattr(trials, "_MEMORY", 100)
    d = deqkit.diagnose(
        f, x0, args=args, solvers=["anderson"], adjoints=["unrolled", deqkit.UnrolledAdjoint(checkpoint=True)]
    )
    assert "it would keep about" in d.adjoints[0].exception and d.adjoints[1].cosine is not None


def test_the_memory_of_a_call_is_measured() -> None:
    from deqkit.diagnosis.gradient_checks import saved_bytes
    from deqkit.diagnosis.subject import Subject

    weight = nn.Parameter(0.1 * torch.eye(50))
    x0 = torch.zeros(8, 50)
    kept = saved_bytes(Subject(lambda x: torch.sin(torch.cos(x @ weight)), x0, (), 1))
    assert kept == pytest.approx(3 * 8 * 50 * 4, rel=1e-9)  # x, the inputs of cos and of sin


def test_a_solver_or_an_adjoint_that_fails_is_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(deqkit.Solver):
        name = "broken"

        def start(self) -> Any:
            raise RuntimeError("worn out")

    class Odd(deqkit.Adjoint):
        name = "odd"

        def attach(self, problem: Any, x: Any) -> Any:
            raise RuntimeError("not today")

    monkeypatch.setitem(SOLVERS, "broken", Broken)
    monkeypatch.setitem(deqkit.solvers._DEFAULTS, "broken", Broken())  # pyright: ignore
    monkeypatch.setitem(ADJOINTS, "odd", Odd)
    f, x0, args = patients.healthy()
    d = deqkit.diagnose(f, x0, args=args)
    assert {t.name: t.exception for t in d.solvers}["broken"] == "RuntimeError: worn out"
    assert {t.name: t.exception for t in d.adjoints}["odd"] == "RuntimeError: not today"
    assert "worn out" in str(d) and "not today" in str(d) and "broken ended in an error" in advice(d)
    assert d.best is not None and d.plot() is not None


class Restless(nn.Module):
    """Leaves traces wherever a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.calls = nn.Parameter(torch.full((4,), 0.5)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.latest = x
        if "seen" not in self._buffers:
            self.register_buffer("seen", torch.zeros(4))
            self.register_parameter("late", nn.Parameter(torch.zeros(())))
        with torch.no_grad():
            self.gain.mul_(0.99)
        return self.gain * x + 1


def test_whatever_f_does_to_its_modules_is_undone() -> None:
    f = Restless()
    before, attributes = copy.deepcopy(f.state_dict()), set(vars(f))
    d = few(f, torch.zeros(2, 4))
    assert "stateless" in failures(d)
    assert f.state_dict().keys() == before.keys() and torch.equal(f.gain, before["gain"])
    assert f.calls == 0 and set(vars(f)) == attributes


def test_an_inner_layer_is_left_as_it_was() -> None:
    inner = deqkit.nn.FixedPoint(nn.Sequential(nn.Dropout(0.1)), on_failure="ignore")
    few(lambda x: 0.5 * x + 0.1 * inner(torch.zeros_like(x)), torch.zeros(2, 4))
    assert inner.last_solution is None
    with pytest.warns(UserWarning, match="Dropout"):  # of which nobody has heard yet
        inner(torch.ones(2, 4))


def test_lazy_and_scripted_modules() -> None:
    lazy = nn.LazyLinear(4)
    assert verdicts(few(lambda x: 0.1 * lazy(x), torch.zeros(2, 4)))["runs"] == "passed"
    assert lazy(torch.zeros(2, 4)).shape == (2, 4) and lazy.in_features == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its age
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    before = copy.deepcopy(scripted.state_dict())
    few(lambda x: 0.1 * scripted(x), torch.zeros(2, 4))
    assert all(torch.equal(value, before[key]) for key, value in scripted.state_dict().items()) and scripted.training


def test_several_fixed_points() -> None:
    b = 1e-3 * patients.draw(3, 4, seed=0)
    d = deqkit.diagnose(lambda x: torch.tanh(3 * x) + b, b)
    assert "f has several fixed points" in advice(d) and d.spectrum is not None


def test_near_singular() -> None:
    slope = torch.linspace(-0.5, 0.99, 6)
    d = deqkit.diagnose(lambda x: slope * x + 0.01, torch.zeros(2, 6))
    assert "eigenvalue 0.990, close to 1" in advice(d) and "100 times the residual" in advice(d)


def test_more_steps_would_do() -> None:
    slope = torch.full((4,), 0.95)
    d = deqkit.diagnose(lambda x: slope * x + 0.01, torch.zeros(2, 4), solvers=["fixed_point"])
    steps = int(advice(d).split("raise max_steps to about ")[1].split(",")[0])
    with torch.no_grad():
        sol = deqkit.solve(lambda x: slope * x + 0.01, torch.zeros(2, 4), solver="fixed_point", max_steps=300)
    assert abs(int(sol.num_steps.max()) - steps) <= 0.15 * steps


def test_a_jacobian_far_from_normal() -> None:
    a = matrix(6, 0.3, seed=0).triu(1) * 10 + 0.3 * torch.eye(6, dtype=torch.float64)
    d = deqkit.diagnose(affine, torch.zeros(2, 6, dtype=torch.float64), args=(a, torch.ones(6, dtype=torch.float64)))
    assert d.spectrum is not None and d.spectrum.norm is not None and d.spectrum.norm.max() > 3
    assert "the Jacobian's norm is" in advice(d)
