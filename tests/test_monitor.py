"""The Monitor: its figures are those of the solves, and it changes nothing about them."""

from __future__ import annotations

import concurrent.futures
import copy
import csv
import gc
import io
import math
import pickle
import subprocess
import sys
import warnings
import weakref
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import deqkit
from deqkit.monitor import tally
from deqkit.monitor.tally import Tally


class Cell(nn.Module):
    def __init__(self, n: int = 6, gain: float = 0.7) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n)
        nn.init.orthogonal_(self.linear.weight, gain=gain)

    def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) + inputs)


class Scale(nn.Module):
    """x <- gain x + 1, per sample: a plain iteration diverges from 1 on and is not finite for a NaN."""

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return gain.unsqueeze(1) * x + 1


class Encoder(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.deq = deqkit.nn.FixedPoint(Cell(), **settings)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.deq(torch.zeros_like(inputs), inputs)


class Net(nn.Module):
    """Two layers that solve, one inside another module."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.encoder = Encoder(**settings)
        self.head = deqkit.nn.FixedPoint(Cell(), **settings)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.zeros_like(inputs), self.encoder(inputs))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def scaled(gains: list[float], **settings: Any) -> deqkit.Solution:
    gain = torch.tensor(gains, dtype=torch.float64)
    settings = {"solver": "fixed_point", "on_failure": "ignore", "max_steps": 20} | settings
    return deqkit.solve(Scale(), torch.zeros(len(gains), 1, dtype=torch.float64), args=(gain,), **settings)


# ---------------------------------------------------------------------------------------------------------------------
# figures


def test_figures_are_those_of_the_solutions() -> None:
    monitor = deqkit.Monitor()
    solutions = [scaled([0.1, 0.5, 0.5]), scaled([0.5, 0.99, math.nan]), scaled([0.2, 0.3])]
    for solution in solutions:
        monitor.record(solution, "layer")
    steps = torch.cat([s.num_steps for s in solutions]).double()
    residuals = torch.cat([s.relative_residual for s in solutions])
    figures = monitor.compute()
    expected = {
        "solves": 3,
        "failed_solves": 1,
        "calls_mean": sum(s.num_fn_evals for s in solutions) / 3,
        "steps_mean": steps.mean().item(),
        "steps_max": steps.max().item(),
        "relative_residual_median": residuals.nan_to_num(nan=math.inf).median().item(),
        "relative_residual_worst": math.inf,
        "failed": 2 / 8,
        "failed_max_steps": 1 / 8,
        "failed_stagnated": 0,
        "failed_diverged": 0,
        "failed_nonfinite": 1 / 8,
    }
    assert figures == pytest.approx({f"layer/{name}": value for name, value in expected.items()})
    assert all(type(value) is float for value in figures.values())
    assert monitor.compute() == figures, "to look does not end the window"


@pytest.mark.parametrize("shapes", [[(3,)] * 200, [(3,), (), (2, 5), (0,), (7,)] * 40])
def test_folding_changes_nothing(shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether sums are made after every solve, after some, or all at once."""
    generator = torch.Generator().manual_seed(1)

    def outcome(shape: tuple[int, ...]) -> deqkit.Solution:
        status = torch.randint(0, 5, shape, generator=generator)
        residual = torch.rand(shape, generator=generator)
        steps = torch.randint(0, 50, shape, generator=generator)
        return deqkit.Solution(None, status, residual, residual, steps, 7, rtol=1e-4)

    outcomes = [outcome(shape) for shape in shapes]
    totals = []
    for limit in (1, 64, 10**6):
        monkeypatch.setattr(tally, "_PENDING", limit)
        monkeypatch.setattr(tally, "_PENDING_SAMPLES", limit)
        collected = Tally()
        for one in outcomes:
            collected.add(one)
        totals.append(collected.read())
    assert totals[0] == totals[1] == totals[2]
    status = torch.cat([one.status.reshape(-1) for one in outcomes])
    assert totals[0].counts == tuple(status.bincount(minlength=5).tolist())
    assert totals[0].failed_solves == sum(bool((one.status != 0).any()) for one in outcomes)
    assert totals[0].steps == sum(int(one.num_steps.sum()) for one in outcomes)


def test_the_median_is_over_the_latest_samples_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "_MEDIAN_SAMPLES", 100)
    collected = Tally()
    for k in range(1000):
        residual = torch.full((3,), float(k))
        collected.add(deqkit.Solution(None, residual.long() * 0, residual, residual, residual.long(), 1, rtol=1e-4))
    assert 930 < collected.read().median < 1000 and collected.read().worst == 999
    held = [*collected._residuals, *(one.status for one in collected._pending)]
    assert sum(t.numel() for t in held) < 100 + 2 * 64 * 3
    # A single solve with more samples than that.
    residual = torch.linspace(0, 1, 1000)
    collected.reset()
    collected.add(deqkit.Solution(None, residual.long() * 0, residual, residual, residual.long(), 1, rtol=1e-4))
    assert collected.read().median == pytest.approx(0.95, abs=0.01) and collected.read().samples == 1000


def test_a_window_ends_with_a_flush() -> None:
    monitor = deqkit.Monitor(on_failure="ignore")
    monitor.record(scaled([0.99]))
    assert monitor.flush(10)["solve/failed"] == 1
    monitor.record(scaled([0.5]))
    assert monitor.flush(20)["solve/failed"] == 0
    assert monitor.flush(30) == {}
    assert [(row["step"], row["solve/failed"]) for row in monitor.history] == [(10, 1.0), (20, 0.0)]
    assert "1 of 2 solves had samples that did not converge (1 of 2: 1 MAX_STEPS)" in str(monitor)


def test_a_fixed_number_of_steps_is_no_failure() -> None:
    monitor = deqkit.Monitor()
    monitor.record(scaled([0.5, 0.9], rtol=0.0, max_steps=3))
    monitor.record(scaled([0.5, math.nan], rtol=0.0, max_steps=3))
    figures = monitor.compute()
    assert figures["solve/failed"] == 0.25 == figures["solve/failed_nonfinite"] and figures["solve/steps_max"] == 3


def test_odd_states() -> None:
    """One system, two batch dims, no sample at all, half precision, complex numbers, a pytree."""
    monitor = deqkit.Monitor()
    half = lambda x: torch.utils._pytree.tree_map(lambda t: 0.5 * t + 1, x)  # noqa: E731
    for x0, batch_dims in [
        (torch.zeros(3), 0),
        (torch.zeros(2, 2, 3), 2),
        (torch.zeros(0, 3), 1),
        (torch.zeros(2, 3, dtype=torch.bfloat16), 1),
        (torch.zeros(2, 3, dtype=torch.complex64), 1),
        ({"a": torch.zeros(2, 3), "b": [torch.zeros(2, 1)]}, 1),
    ]:
        monitor.record(deqkit.solve(half, x0, rtol=0.05, batch_dims=batch_dims))
    figures = monitor.flush()
    assert figures["solve/solves"] == 6 and figures["solve/failed"] == 0
    empty = deqkit.Monitor()
    empty.record(deqkit.solve(half, torch.zeros(0, 3)))
    assert empty.flush() == {} and "nothing" not in str(empty)


# ---------------------------------------------------------------------------------------------------------------------
# layers


def test_layers_are_found_and_told_apart() -> None:
    net, inputs = Net(), torch.randn(4, 6)
    with deqkit.Monitor(net) as monitor:
        assert monitor.layers == ["encoder.deq", "head"]
        net(inputs)
        net.eval()
        net(inputs)
        net(inputs)
    row = monitor.history[0]
    names = {key.rpartition("/")[0] for key in row} - {""}
    assert names == {"encoder.deq", "head", "encoder.deq.eval", "head.eval"}
    assert row["head/solves"] == 1 and row["head.eval/solves"] == 2
    assert row["head/steps_max"] == net.head.last_solution.num_steps.max()
    net(inputs)
    assert len(monitor.history) == 1 and not monitor.compute()


def test_any_module_with_a_last_solution_is_a_layer() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last_solution: deqkit.Solution | None = None

        def forward(self, x: Tensor, solve: bool = True) -> Tensor:
            if solve:
                self.last_solution = deqkit.solve(lambda z: 0.5 * z + x, torch.zeros_like(x)).detach()
            return x

    own = Own()
    monitor = deqkit.Monitor(own)
    own(torch.ones(2, 3))
    own(torch.ones(2, 3), solve=False)
    assert monitor.layers == ["solve"] and monitor.compute()["solve/solves"] == 1
    with pytest.raises(ValueError, match=r"Linear holds no deqkit.nn.FixedPoint"):
        deqkit.Monitor(nn.Linear(2, 2))


def test_the_neck_of_a_detector() -> None:
    from adapters.detection import ImplicitFPN

    neck = ImplicitFPN([4, 8], 8, max_steps=1, rtol=1e-6)
    features = OrderedDict(a=torch.randn(2, 4, 8, 8), b=torch.randn(2, 8, 4, 4))
    with pytest.warns(deqkit.ConvergenceWarning, match="solve: 2 of 2 solves had samples"):
        with deqkit.Monitor(neck) as monitor:
            for _ in range(2):
                sum(level.sum() for level in neck(features).values()).backward()
    assert monitor.history[0]["solve/failed"] == 1 and monitor.history[0]["solve/adjoint_solves"] == 2
    with pytest.warns(deqkit.ConvergenceWarning, match="solve: 2 of 2 samples"):
        neck(features)
    assert copy.deepcopy(neck).num_monitors == 0


def test_training_is_the_same_bit_for_bit() -> None:
    def train(monitored: bool) -> list[Tensor]:
        torch.manual_seed(3)
        net, dropout = Net(), nn.Dropout(0.3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        monitor = deqkit.Monitor(net, every=2, radius_every=2) if monitored else None
        for _ in range(6):
            optimizer.zero_grad()
            net(dropout(torch.randn(4, 6))).square().sum().backward()
            optimizer.step()
            if monitor is not None:
                monitor.step()
        assert monitor is None or len(monitor.history) == 3
        return [p.detach() for p in net.parameters()]

    for with_it, without in zip(train(True), train(False), strict=True):
        assert torch.equal(with_it, without)


class Synchronisations(TorchDispatchMode):
    """Counts operations that make the host wait for a device, and in all."""

    WAIT = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique", "bincount", "equal", "_to_copy")

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        name = func.overloadpacket.__name__
        # A copy to another dtype stays on the device.
        if name in self.WAIT and not (name == "_to_copy" and "device" not in (kwargs or {})):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_between_flushes() -> None:
    layer = deqkit.nn.FixedPoint(Cell())
    x0, inputs = torch.zeros(4, 6), torch.randn(4, 6)
    monitor = deqkit.Monitor(layer, every=None)
    (hook,) = layer._forward_hooks.values()
    layer(x0, inputs).sum().backward()
    solution = layer.last_solution
    watch = Synchronisations()
    with watch:
        for _ in range(300):
            layer._last_solution = copy.copy(solution)
            hook(layer, (x0, inputs), None)
            monitor.step()
    assert watch.waits == [] and 0 < watch.operations < 10 * 300
    with Synchronisations() as watch:
        assert monitor.flush()["solve/solves"] == 301
    assert watch.waits, "this test can fail"


def test_the_layers_own_check_for_failures_is_saved() -> None:
    """With "warn" a solve looks at the device once more, at its end."""
    layer = deqkit.nn.FixedPoint(Cell())
    x0, inputs = torch.zeros(4, 6), torch.randn(4, 6)
    monitor = deqkit.Monitor(layer)
    with torch.no_grad():
        with Synchronisations() as before:
            layer(x0, inputs)
        monitor.step()
        with Synchronisations() as after:
            layer(x0, inputs)
    assert len(after.waits) == len(before.waits) - 1


def test_no_graph_is_kept_alive() -> None:
    layer = deqkit.nn.FixedPoint(Cell())
    monitor = deqkit.Monitor(layer, every=None)
    inputs = torch.randn(4, 6, requires_grad=True)
    x, graph = layer(torch.zeros(4, 6), inputs), weakref.ref(inputs)
    del x, inputs
    gc.collect()
    assert graph() is None and monitor.compute()["solve/solves"] == 1
    # Nor by a solution that has a graph itself.
    inputs = torch.randn(4, 6, requires_grad=True)
    sol, graph = deqkit.solve(layer.module, torch.zeros(4, 6), args=(inputs,)), weakref.ref(inputs)
    monitor.record(sol)
    del sol, inputs
    gc.collect()
    assert graph() is None


# ---------------------------------------------------------------------------------------------------------------------
# adjoint


def test_the_adjoint_is_read_after_its_backward_pass() -> None:
    layer = deqkit.nn.FixedPoint(Cell())
    monitor = deqkit.Monitor(layer, every=None)
    inputs = torch.randn(4, 6)
    outs = [layer(torch.zeros(4, 6), k * inputs) for k in (1, 2, 3)]
    assert "solve/adjoint_solves" not in monitor.compute()
    torch.stack(outs[:2]).sum().backward()
    assert monitor.compute()["solve/adjoint_solves"] == 2
    monitor.flush(1)
    outs[2].sum().backward()
    stats = layer.last_solution.adjoint_stats
    second = monitor.flush(2)
    assert second["solve/adjoint_solves"] == 1 and "solve/solves" not in second
    assert second["solve/adjoint_steps_mean"] == stats.num_steps.double().mean()
    assert second["solve/adjoint_calls_mean"] == stats.num_fn_evals
    assert second["solve/adjoint_relative_residual_worst"] == pytest.approx(stats.relative_residual.max().item())
    assert second["solve/adjoint_failed"] == 0


def test_every_adjoint_of_a_long_training_is_counted() -> None:
    """Also beside many solves that never have one."""
    monitor = deqkit.Monitor(every=None)
    sol = scaled([0.5, 0.6])
    for k in range(5000):
        stats = deqkit.AdjointStats()
        monitor.record(replace(sol, adjoint_stats=stats))
        if k % 3 == 0:  # a backward pass
            stats.status, stats.num_steps, stats.rtol = sol.status, sol.num_steps, 1e-4
            stats.residual, stats.relative_residual = sol.residual, sol.relative_residual
    assert len(monitor._records["solve"]._waiting) <= 1024
    figures = monitor.compute()
    assert figures["solve/adjoint_solves"] == 1667 and figures["solve/solves"] == 5000


def test_a_failed_adjoint_is_warned_of_under_its_name() -> None:
    layer = deqkit.nn.FixedPoint(Cell(gain=0.9), adjoint=deqkit.ImplicitAdjoint(rtol=1e-6, max_steps=1), max_steps=100)
    with pytest.warns(deqkit.ConvergenceWarning) as caught:
        with deqkit.Monitor(layer) as monitor:
            for _ in range(3):
                layer(torch.zeros(4, 6), torch.randn(4, 6)).sum().backward()
    (message,) = [str(w.message) for w in caught]
    assert message.startswith("adjoint of solve: 3 of 3 solves had samples that did not converge (12 of 12: 12 MAX_STE")
    assert monitor.history[0]["solve/adjoint_failed"] == 1 and monitor.history[0]["solve/failed"] == 0


@pytest.mark.parametrize("adjoint", ["jfb", "phantom", "unrolled"])
def test_adjoints_without_a_solve(adjoint: str) -> None:
    layer = deqkit.nn.FixedPoint(Cell(), adjoint=adjoint)
    monitor = deqkit.Monitor(layer)
    layer(torch.zeros(4, 6), torch.randn(4, 6)).sum().backward()
    assert not any("adjoint" in key for key in monitor.compute())


def test_double_backward() -> None:
    layer = deqkit.nn.FixedPoint(Cell(), rtol=1e-6, max_steps=100)
    monitor = deqkit.Monitor(layer, every=None)
    inputs = torch.randn(4, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(torch.zeros(4, 6), inputs).sum(), inputs, create_graph=True)
    grad.square().sum().backward()
    assert monitor.compute()["solve/adjoint_solves"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# steps and warnings


def test_steps() -> None:
    layer = deqkit.nn.FixedPoint(Cell())

    def run(monitor: deqkit.Monitor, numbers: list[int | None]) -> list[bool]:
        flushed = []
        for number in numbers:
            layer(torch.zeros(2, 6), torch.randn(2, 6))
            flushed.append(monitor.step(number) is not None)
        monitor.detach()
        return flushed

    counting = deqkit.Monitor(layer, every=3)
    assert run(counting, [None] * 7) == [False, False, True, False, False, True, False]
    assert [(row["step"], row["solve/solves"]) for row in counting.history] == [(3, 3), (6, 3), (7, 1)]
    told = deqkit.Monitor(layer, every=10)  # resumed at 1000, several batches to a step, some steps left out
    assert run(told, [1001, 1009, 1010, 1010, 1027, 1028]) == [False, False, True, False, True, False]
    assert [row["step"] for row in told.history] == [1010, 1027, 1028]
    by_hand = deqkit.Monitor(layer, every=None)
    assert run(by_hand, [None] * 5) == [False] * 5 and by_hand.history[0]["step"] == 5


def failing(**settings: Any) -> tuple[deqkit.nn.FixedPoint, Any]:
    """A layer, and a way to call it with gains."""
    layer = deqkit.nn.FixedPoint(Scale(), solver="fixed_point", max_steps=20, **settings)
    return layer, lambda *gains: layer(torch.zeros(len(gains), 1), torch.tensor(gains))


def test_one_warning_per_kind_with_counts() -> None:
    layer, call = failing()
    monitor = deqkit.Monitor(layer, every=10)
    monitor.step(0)  # from here on
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 101):
            call(0.5, 0.99 if step % 2 else 0.4)
            if step == 75:
                call(math.nan)
            monitor.step(step)
            assert len(caught) == (0 if step < 10 else 1 if step < 80 else 2)
        monitor.detach()
    assert [w.category for w in caught] == [deqkit.ConvergenceWarning] * 3
    first, second, last = (str(w.message) for w in caught)
    assert first.startswith("solve: 5 of 10 solves had samples that did not converge (5 of 20: 5 MAX_STEPS); worst")
    assert "MAX_STEPS: raise max_steps" in first
    assert "41 of 81 solves had" in second and "(41 of 161: 40 MAX_STEPS, 1 NONFINITE)" in second
    assert "NONFINITE: f returned NaN" in second and "51 of 101 solves had" in last
    assert Path(caught[0].filename).name == "test_monitor.py"


def test_warnings_are_held_back_only_where_somebody_will_tell() -> None:
    layer, call = failing()
    monitor = deqkit.Monitor(layer)
    with pytest.warns(deqkit.ConvergenceWarning, match="solve: 1 of 1 samples"):
        call(0.99)
    with monitor:
        assert layer.settings["on_failure"] == "ignore" and layer.on_failure == "warn"
        call(0.5)
        monitor._records.clear()  # for silence at the end
    with pytest.warns(deqkit.ConvergenceWarning, match="solve: 1 of 1 samples"):
        call(0.99)


def test_without_flushes_the_layers_warn_themselves() -> None:
    layer, call = failing()
    monitor = deqkit.Monitor(layer, every=None)
    monitor.step()
    with pytest.warns(deqkit.ConvergenceWarning, match="solve: 1 of 1 samples"):
        call(0.99)


def test_what_nobody_flushed_is_told_in_the_end() -> None:
    code = """
import torch, deqkit
class Scale(torch.nn.Module):
    def forward(self, x):
        return 0.99 * x + 1
layer = deqkit.nn.FixedPoint(Scale(), solver="fixed_point", max_steps=5)
monitor = deqkit.Monitor(layer)
for _ in range(3):
    monitor.step()
    layer(torch.zeros(2, 1))
print("end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "end\n" and done.stderr.count("ConvergenceWarning") == 1
    assert "solve: 3 of 3 solves had samples that did not converge (6 of 6: 6 MAX_STEPS)" in done.stderr
    # The same where the model goes, and the Monitor with it.
    layer, call = failing()
    deqkit.Monitor(layer).step()
    call(0.99)
    with pytest.warns(deqkit.ConvergenceWarning, match="solve: 1 of 1 solves"):
        del layer, call
        gc.collect()


def test_two_monitors_at_once() -> None:
    layer, call = failing()
    first, second = deqkit.Monitor(layer), deqkit.Monitor(layer)
    first.step(), second.step()
    call(0.5)
    first.detach()
    call(0.99)  # the second still holds back
    assert layer.num_monitors == 1 and len(layer._forward_hooks) == 1
    with pytest.warns(deqkit.ConvergenceWarning, match="1 of 2 solves"):
        second.detach()
    second.detach()
    assert layer.num_monitors == 0 and not layer._forward_hooks


def test_ignore_leaves_the_warnings_to_the_layer_and_raise_raises() -> None:
    layer, call = failing()
    with deqkit.Monitor(layer, on_failure="ignore"):
        with pytest.warns(deqkit.ConvergenceWarning, match="solve: 1 of 1 samples"):
            call(0.99)
    layer, call = failing(on_failure="raise")
    with pytest.raises(deqkit.ConvergenceError):
        with deqkit.Monitor(layer) as monitor:
            call(0.5)
            call(0.99)
    assert monitor.history[0]["solve/solves"] == 1 and not layer._forward_hooks and layer.num_monitors == 0


def test_an_error_is_not_hidden_by_a_warning() -> None:
    layer, call = failing()
    with pytest.raises(ZeroDivisionError):
        with deqkit.Monitor(layer) as monitor:
            call(0.99)
            raise ZeroDivisionError
    assert monitor.history[0]["solve/failed"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# spectral radius


@pytest.mark.parametrize("gradients", [True, False])
def test_spectral_radius_is_measured_now_and_then(gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = deqkit.nn.FixedPoint(Scale())
    monitor = deqkit.Monitor(layer, radius_every=3, every=None)
    measured: list[int] = []

    def spectral_radius(*args: Any, **kwargs: Any) -> Any:
        measured.append(monitor._records["solve"].num_solves)
        return deqkit.spectral_radius(*args, **kwargs)

    monkeypatch.setattr("deqkit.monitor.monitor.spectral_radius", spectral_radius)
    gains = torch.tensor([0.2, 0.6])
    with torch.set_grad_enabled(gradients):
        for _ in range(7):
            layer(torch.zeros(2, 1), gains)
    assert measured == [1, 4, 7]
    figures = monitor.flush()
    assert figures["solve/spectral_radius_mean"] == pytest.approx(0.4, rel=1e-2)
    assert figures["solve/spectral_radius_max"] == pytest.approx(0.6, rel=1e-2)
    layer(torch.zeros(2, 1), gains)
    assert "solve/spectral_radius_mean" not in monitor.flush()
    with torch.inference_mode():  # where there are no products with a Jacobian
        for _ in range(3):
            layer(torch.zeros(2, 1), gains)
    assert monitor.flush()["solve/solves"] == 3 and measured == [1, 4, 7]


def test_samples_without_a_radius_do_not_spoil_the_others() -> None:
    layer, call = failing(on_failure="ignore")
    monitor = deqkit.Monitor(layer, radius_every=1, on_failure="ignore")
    call(math.nan, 0.5)
    assert monitor.flush()["solve/spectral_radius_max"] == pytest.approx(0.5)
    call(math.nan)
    figures = monitor.flush()
    assert figures["solve/failed"] == 1 and "solve/spectral_radius_max" not in figures


class Stochastic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + torch.rand_like(x)


class NumPy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(0.5 * x.numpy() + 1)


def test_a_radius_leaves_the_generators_alone() -> None:
    layer, drawn = deqkit.nn.FixedPoint(Stochastic(), on_failure="ignore", max_steps=3), []
    for every in (None, 1):
        monitor = deqkit.Monitor(layer, radius_every=every)
        torch.manual_seed(0)
        layer(torch.zeros(2, 3))
        drawn.append(torch.rand(()))
        assert ("solve/spectral_radius_max" in monitor.compute()) == (every is not None)
    assert drawn[0] == drawn[1]


def test_a_radius_that_cannot_be_had_does_not_stop_the_training() -> None:
    layer = deqkit.nn.FixedPoint(NumPy())
    monitor = deqkit.Monitor(layer, radius_every=1)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"solve: no spectral radius: RuntimeError: .*numpy\(\)"):
        layer(torch.zeros(2, 3))
    with torch.no_grad():
        layer(torch.zeros(2, 3))  # without a second warning
    assert monitor.compute()["solve/solves"] == 2 and "solve/spectral_radius_max" not in monitor.compute()


def test_the_radius_of_a_layer_that_calls_f_with_arguments_of_its_own() -> None:
    class Doubling(deqkit.nn.FixedPoint):
        def forward(self, gain: Tensor) -> Tensor:
            return super().forward(torch.zeros(2, 1), 2 * gain)

    layer = Doubling(Scale())
    monitor = deqkit.Monitor(layer, radius_every=1)
    layer(torch.tensor([0.1, 0.2]))
    assert monitor.compute()["solve/spectral_radius_max"] == pytest.approx(0.4)
    assert not copy.deepcopy(layer)._listeners
    monitor.detach()
    assert not layer._listeners


def test_inner_solves_for_a_radius_do_not_count() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = deqkit.nn.FixedPoint(Scale())

        def forward(self, x: Tensor, gain: Tensor) -> Any:
            return 0.5 * x + self.inner(torch.zeros_like(x), gain), x

    layer = deqkit.nn.FixedPoint(Outer(), has_aux=True)
    monitor = deqkit.Monitor(layer, radius_every=1)
    layer(torch.zeros(2, 1), torch.tensor([0.1, 0.2]))
    figures = monitor.compute()
    assert monitor.layers == ["solve", "module.inner"]
    assert figures["module.inner/solves"] == figures["solve/calls_mean"]
    assert figures["solve/spectral_radius_max"] == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------------------------------
# loggers


def train(layer: deqkit.nn.FixedPoint, monitor: deqkit.Monitor, steps: int, first: int = 1) -> None:
    for step in range(first, first + steps):
        layer(torch.zeros(2, 6), torch.randn(2, 6)).sum().backward()
        monitor.step(step)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv(tmp_path: Path) -> None:
    layer, path = deqkit.nn.FixedPoint(Cell()), tmp_path / "new" / "solver.csv"
    monitor = deqkit.Monitor(layer, logger=path, every=2)
    train(layer, monitor, 4)
    monitor.record(scaled([0.5]), "other")  # which gets columns of its own
    train(layer, monitor, 2, first=5)
    monitor.detach()
    rows = read(path)
    assert [int(row["step"]) for row in rows] == [2, 4, 6]
    assert [row["other/solves"] for row in rows] == ["", "", "1.0"]
    for row, kept in zip(rows, monitor.history, strict=True):
        assert {key: float(value) for key, value in row.items() if value} == pytest.approx(kept)
    resumed = deqkit.Monitor(layer, logger=str(path), every=2)
    train(layer, resumed, 2, first=7)
    resumed.detach()
    assert [int(row["step"]) for row in read(path)] == [2, 4, 6, 8] and list(read(path)[0]) == list(rows[0])
    deqkit.plots.history(path)
    assert [p.name for p in path.parent.iterdir()] == ["solver.csv"]


def test_csv_that_was_cut_short(tmp_path: Path) -> None:
    layer, path = deqkit.nn.FixedPoint(Cell()), tmp_path / "solver.csv"
    with deqkit.Monitor(layer, logger=path, every=1) as monitor:
        train(layer, monitor, 2)
    whole = path.read_bytes()
    for cut in (1, 24, len(whole) // 3, len(whole) - 40):  # down to the middle of the header
        path.write_bytes(whole[:-cut])
        complete = max(0, whole[:-cut].count(b"\n") - 1)
        if complete:
            deqkit.plots.history(path)
        with deqkit.Monitor(layer, logger=path, every=1) as monitor:
            train(layer, monitor, 2, first=7)
            monitor.record(scaled([0.5]), "other")  # for which the file is written anew
        steps = [1, 2][:complete] + [7, 8]
        assert [int(row["step"]) for row in read(path)][: len(steps)] == steps
        assert all(float(row["solve/solves"] or 1) == 1 for row in read(path))


def test_tensorboard_and_lightning(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.tensorboard import SummaryWriter

    class Writer:
        def __init__(self) -> None:
            self.scalars: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.scalars.append((tag, value, step))

    layer, writer, lightning = deqkit.nn.FixedPoint(Cell()), Writer(), CSVLogger(tmp_path, name="a")
    board = SummaryWriter(str(tmp_path / "board"))
    monitor = deqkit.Monitor(layer, logger=[writer, board, lightning], every=2)
    train(layer, monitor, 4)
    lightning.save()
    board.close()
    expected = [(key, value, row["step"]) for row in monitor.history for key, value in row.items() if key != "step"]
    assert writer.scalars == expected
    rows = read(Path(lightning.log_dir) / "metrics.csv")
    assert [row["step"] for row in rows] == ["2", "4"]
    assert float(rows[1]["solve/steps_mean"]) == monitor.history[1]["solve/steps_mean"]
    assert any((tmp_path / "board").iterdir())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 2.5}, TypeError, "every must be an integer"),
        ({"radius_every": 0}, ValueError, "radius_every must be at least 1"),
        ({"on_failure": "raise"}, ValueError, r"unknown on_failure 'raise': choose one of \['warn', 'ignore'\]"),
        ({"logger": 3}, TypeError, "logger must be the path of a CSV file, .* got int"),
        ({"logger": Path(__file__).parent}, IsADirectoryError, "is a folder"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        deqkit.Monitor(**settings)


def test_only_solutions_are_recorded() -> None:
    with pytest.raises(TypeError, match="solution must be a deqkit.Solution, got Tensor"):
        deqkit.Monitor().record(torch.zeros(3))  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------------------------------------------------------------
# what else is done with a model


def test_copies_and_pickles_of_a_monitored_model() -> None:
    net, inputs = Net(), torch.randn(2, 6)
    net.monitor = deqkit.Monitor(net, every=1)
    net.monitor.step(0)
    out = net(inputs)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), loaded):
        assert torch.equal(other(inputs), out)
        assert other.head.num_monitors == 0 and net.head.num_monitors == 1
        copied = other.monitor.compute()
        assert copied["head/solves"] == 1, "the copy's Monitor has the figures of before, and hears nothing"
        other.monitor.detach()
    assert net.monitor.compute()["head/solves"] == 1
    assert list(net.state_dict()) == list(Net().state_dict())


def test_compiled_models_with_solves_to_a_tolerance() -> None:
    net, inputs = Net(), torch.randn(3, 6)
    expected = net(inputs)
    compiled = torch.compile(net, backend="eager")
    monitor = deqkit.Monitor(compiled, every=None)  # pyright: ignore[reportArgumentType]
    assert monitor.layers == ["encoder.deq", "head"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's own, about tensors that it looks at while it traces
        for _ in range(3):
            out = compiled(inputs)
            out.sum().backward()
    torch.testing.assert_close(out, expected)
    figures = monitor.compute()
    assert figures["head/solves"] == figures["encoder.deq/solves"] == figures["head/adjoint_solves"] == 3


def test_compiled_models_of_one_graph_stay_in_one_graph() -> None:
    torch.compiler.reset()  # graph breaks of other tests are remembered with the code of Net
    net = Net(solver="fixed_point", rtol=0.0, max_steps=4, on_failure="ignore", adjoint="unrolled")
    inputs = torch.randn(3, 6)
    with deqkit.Monitor(net) as monitor:
        out = torch.compile(net, backend="eager", fullgraph=True)(inputs)
        assert monitor.compute() == {}
        torch.testing.assert_close(out, net(inputs))
        assert monitor.compute()["head/steps_max"] == 4
        program = torch.export.export(net.eval(), (inputs,))
    torch.testing.assert_close(program.module()(inputs), net(inputs))


def test_transforms() -> None:
    cell = Cell()
    layer = deqkit.nn.FixedPoint(cell, adjoint="unrolled")
    monitor = deqkit.Monitor(layer, every=None)
    inputs = torch.randn(3, 6)
    torch.func.grad(lambda b: layer(torch.zeros(3, 6), b).sum())(inputs)
    assert monitor.flush()["solve/solves"] == 1


def test_threads() -> None:
    monitor = deqkit.Monitor(every=None)
    solutions = [scaled([0.5, 0.99]) for _ in range(8)]

    def job(k: int) -> None:
        for solution in solutions:
            monitor.record(solution, f"layer{k % 2}")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(job, range(200)))
    figures = monitor.compute()
    assert figures["layer0/solves"] == figures["layer1/solves"] == 800 == figures["layer0/failed_solves"]


def test_distributed_wrapper_keeps_the_names() -> None:
    net = Net()
    assert deqkit.Monitor(nn.DataParallel(net)).layers == ["encoder.deq", "head"]


@pytest.mark.parametrize(("reentrant", "solves"), [(False, 1), (True, 2)])
def test_checkpointing(reentrant: bool, solves: int) -> None:
    """The recomputation of the newer kind stops before the layer's end, where it would be seen."""
    layer = deqkit.nn.FixedPoint(Cell())
    monitor = deqkit.Monitor(layer, every=None)
    inputs = torch.randn(3, 6, requires_grad=True)
    x = torch.utils.checkpoint.checkpoint(layer, torch.zeros(3, 6), inputs, use_reentrant=reentrant)
    x.sum().backward()
    figures = monitor.compute()
    assert figures["solve/solves"] == solves and figures["solve/adjoint_solves"] == 1
