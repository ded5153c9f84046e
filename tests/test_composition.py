"""What PyTorch users put around a solve: compilation, export, threads, distributed training, unusual tensors."""

from __future__ import annotations

import concurrent.futures
import copy
import itertools
import runpy
import socket
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import deqkit

FIXED = {"rtol": 0.0, "atol": 0.0, "max_steps": 5, "on_failure": "ignore"}


class Cell(nn.Module):
    def __init__(self, n: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n)
        nn.init.orthogonal_(self.linear.weight, gain=0.7)

    def forward(self, x: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x) + inputs)


class Net(nn.Module):
    """An equilibrium layer between two ordinary ones."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 6)
        self.equilibrium = deqkit.nn.FixedPoint(Cell(), **settings)
        self.head = nn.Linear(6, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        inputs = self.encoder(inputs)
        return self.head(self.equilibrium(torch.zeros_like(inputs), inputs))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def gradients(net: nn.Module, out: torch.Tensor) -> list[torch.Tensor]:
    net.zero_grad()
    out.square().sum().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


# "aot_eager" traces forward and backward without generating code, which would need a compiler and minutes.
def test_compiled_f() -> None:
    net, inputs = Net(), torch.randn(3, 6)
    expected = net(inputs)
    expected_gradients = gradients(net, expected)
    net.equilibrium.module.compile(backend="aot_eager")
    out = net(inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(net, out), expected_gradients)


@pytest.mark.parametrize("adjoint", ["implicit", "neumann", "phantom"])
def test_compiled_f_at_several_sizes(adjoint: str) -> None:
    """With dynamic shapes, from the second size on, a compiled backward pass has to be told that its graph is kept."""
    net = Net(adjoint=adjoint)
    net.equilibrium.module.compile(backend="aot_eager")
    eager = copy.deepcopy(net)
    assert eager.equilibrium.module._compiled_call_impl is None
    for batch in (3, 4, 5):
        inputs = torch.randn(batch, 6)
        torch.testing.assert_close(gradients(net, net(inputs)), gradients(eager, eager(inputs)))


def test_products_along_a_compiled_f_at_several_sizes() -> None:
    cell = Cell()
    compiled = torch.compile(cell, backend="aot_eager")
    for batch in (3, 4, 5):
        x, b = torch.randn(batch, 6), torch.randn(batch, 6)
        torch.testing.assert_close(deqkit.spectral_radius(compiled, x, (b,)), deqkit.spectral_radius(cell, x, (b,)))


@pytest.mark.parametrize("missing", ["setting", "module"])
def test_without_the_setting_that_lets_compiled_graphs_be_kept(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch may well take it away; who compiles nothing shall not notice."""
    if missing == "setting":
        monkeypatch.delitem(torch._functorch.config._config, "donated_buffer")
    else:
        monkeypatch.setitem(sys.modules, "torch._functorch", types.ModuleType("without"))
    found = runpy.run_path(deqkit.compiled.__file__)
    with found["graphs_to_keep"]():
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("start", [2, 3])
def test_another_thread_that_compiles(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's mark of that is one for all threads, and may come and go while f is evaluated."""
    net, x0, b = Cell(), torch.zeros(3, 6), torch.randn(3, 6)
    expected = deqkit.solve(net, x0, args=(b,)).value
    calls = itertools.count(1)

    def f(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(torch.compiler, "_is_compiling_flag", (next(calls) - start) % 2 == 0)
        return net(x, b)

    try:
        value = deqkit.solve(f, x0, args=(b,)).value
    finally:
        monkeypatch.undo()
    torch.testing.assert_close(value, expected)


class Scaled(Cell):
    """Its tanh is an intermediate result that derivatives need."""

    def forward(self, x: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return 0.9 * super().forward(x, inputs)


def test_a_graph_that_was_compiled_to_be_walked_once_is_refused() -> None:
    """It may write over what it has saved: to go on would be silently wrong."""
    net = Net()
    cell = net.equilibrium.module = Scaled()
    cell.compile(backend="aot_eager", dynamic=True)
    x, b = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    cell(x, b).sum().backward()  # compiled here, outside of a solve
    out = net(torch.randn(3, 6))
    with pytest.raises(RuntimeError, match="donated"):
        gradients(net, out)


def test_compiled_module_around_a_solve() -> None:
    net, inputs = Net(), torch.randn(3, 6)
    expected = net(inputs)
    expected_gradients = gradients(net, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, about tensors that it looks at while it traces
        out = torch.compile(net, backend="aot_eager")(inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(net, out), expected_gradients)


@pytest.mark.parametrize("adjoint", ["implicit", "neumann", "phantom", "unrolled"])
def test_fixed_steps_in_one_graph_with_gradients(adjoint: str) -> None:
    """A module whose parameters f closes over; a second batch size compiles it for any."""
    how = deqkit.ImplicitAdjoint("fixed_point") if adjoint == "implicit" else adjoint
    net = Net(adjoint=how, solver="fixed_point", **FIXED)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for batch in (3, 5, 7):
        inputs = torch.randn(batch, 6)
        out, expected = compiled(inputs), net(inputs)
        torch.testing.assert_close(out, expected)
        found = gradients(net, out)
        assert len(found) == 6
        torch.testing.assert_close(found, gradients(net, expected))


def test_a_graph_is_compiled_around_what_breaks_it() -> None:
    """f that no compiler can trace: the solve around it runs as it is."""
    net, inputs = Net(solver="fixed_point", **FIXED), torch.randn(3, 6)
    cell = net.equilibrium.module
    net.equilibrium.module = Breaking(cell)
    expected = gradients(net, net(inputs))
    torch.testing.assert_close(gradients(net, torch.compile(net, backend="aot_eager")(inputs)), expected)


class Breaking(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return self.cell(x, inputs)


@pytest.mark.parametrize("name", ["grad", "vmap_grad", "jvp"])
def test_compiled_transform_around_a_solve(name: str) -> None:
    w, b = 0.2 * torch.randn(4, 4), torch.randn(3, 4)

    def total(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return deqkit.solve(lambda x: torch.tanh(x @ w.T + b), torch.zeros_like(b), rtol=1e-5).value.pow(2).sum()

    transforms = {
        "grad": lambda w: torch.func.grad(total)(w, b),
        "vmap_grad": lambda w: torch.vmap(torch.func.grad(total), (None, 0))(w, b.unsqueeze(1)),
        "jvp": lambda w: torch.func.jvp(lambda w: total(w, b), (w,), (w,))[1],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, about functions of its own that it cannot trace
        found = torch.compile(transforms[name], backend="aot_eager")(w)
    torch.testing.assert_close(found, transforms[name](w))


@pytest.mark.parametrize(
    ("solver", "adjoint", "strict"),
    [
        ("fixed_point", "implicit", False),
        ("anderson", "implicit", False),
        ("broyden", "implicit", False),
        ("newton_krylov", "jfb", False),
        ("bicgstab", "neumann", False),
        ("reversible", "reversible", False),
        ("anderson", "unrolled", False),
        ("fixed_point", "unrolled", True),
        ("anderson", "implicit", True),
    ],
)
def test_export(solver: str, adjoint: str, strict: bool) -> None:
    net, inputs = Net(solver=solver, adjoint=adjoint, **FIXED).eval(), torch.randn(3, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # `last_solution` is not set by a graph
        program = torch.export.export(
            net, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=strict
        )
    for batch in (1, 3, 8):
        other = torch.randn(batch, 6)
        torch.testing.assert_close(program.module()(other), net(other))


def test_an_exported_solve_can_be_trained_if_it_is_unrolled() -> None:
    net, inputs = Net(adjoint="unrolled", **FIXED), torch.randn(3, 6)
    module = torch.export.export(net, (inputs,)).module()
    module(inputs).square().sum().backward()
    expected = dict(zip((n for n, _ in net.named_parameters()), gradients(net, net(inputs)), strict=True))
    torch.testing.assert_close({n: p.grad for n, p in module.named_parameters()}, expected)


@pytest.mark.parametrize(("solver", "max_steps"), [("fixed_point", 5), ("anderson", 3), ("broyden", 3)])
def test_onnx(solver: str, max_steps: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra deqkit[export]")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    net = Net(solver=solver, **FIXED | {"max_steps": max_steps}).double().eval()
    batches = [torch.randn(batch, 6, dtype=torch.float64) for batch in (3, 1, 8)]
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.onnx.export(net, (batches[0],), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(str(tmp_path / "net.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    for inputs in batches:
        (out,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), net(inputs))


def test_threads() -> None:
    net, inputs = Net(), torch.randn(3, 6)
    out = net(inputs)
    expected = gradients(net, out)

    def job(_: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        mine = Net()
        mine.load_state_dict(net.state_dict())
        result = mine(inputs)
        return result, gradients(mine, result)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for result, found in pool.map(job, range(8)):
            assert torch.equal(result, out)
            torch.testing.assert_close(found, expected)


def test_inference_mode() -> None:
    net, inputs = Net(), torch.randn(3, 6)
    with torch.inference_mode():
        out = net(inputs)
    torch.testing.assert_close(out, net(inputs))


@pytest.mark.parametrize(
    "x0",
    [torch.zeros(1, 1).expand(4, 6), torch.zeros(6, 4).T, torch.zeros(8, 12)[::2, ::2]],
    ids=["expanded", "transposed", "strided"],
)
@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden", "newton_krylov", "bicgstab", "reversible"])
def test_memory_layouts(x0: torch.Tensor, solver: str) -> None:
    b = torch.randn(4, 6)
    sol = deqkit.solve(lambda x: 0.5 * x + b, x0, solver=solver, rtol=1e-6)
    assert sol.converged.all() and not x0.any()
    torch.testing.assert_close(sol.value, 2 * b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden", "newton_krylov", "auto", "reversible"])
def test_a_single_number(solver: str) -> None:
    sol = deqkit.solve(
        torch.cos, torch.tensor(0.5, dtype=torch.float64), batch_dims=0, solver=solver, rtol=1e-12, max_steps=150
    )
    assert sol.value.shape == () and sol.value.item() == pytest.approx(0.7390851332151607, rel=1e-10)


def test_an_exception_of_f_passes_through_and_leaves_nothing_behind() -> None:
    net, inputs = Net(), torch.randn(3, 6)
    net(inputs)
    before = net.equilibrium.last_solution
    hook = net.equilibrium.module.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(inputs)
    hook.remove()
    assert net.equilibrium.last_solution is before and torch.is_grad_enabled()
    assert net(inputs).requires_grad


@pytest.mark.parametrize("adjoint", ["implicit", "unrolled"])
def test_gradient_scaling_of_mixed_precision(adjoint: str) -> None:
    """A scaled loss, as a GradScaler makes it: the adjoint's tolerance is relative, its answer scales along."""
    net, inputs = Net(adjoint=adjoint), torch.randn(3, 6)
    plain = gradients(net, net(inputs))
    scaled = gradients(net, 2.0**8 * net(inputs))  # squared: 2**16, the scaler's first scale
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(b / 2.0**16, a, rtol=1e-5, atol=1e-7)


def _train_on_one_rank(rank: int, port: int, how: str, folder: Path, on_failure: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        net = Net(rtol=1e-6)
        inputs = torch.randn(4, 6)
        inputs[2:] *= 20  # saturates the layer: the second rank needs fewer steps
        mine = inputs[2 * rank : 2 * rank + 2]
        if how == "ddp":
            wrapped: nn.Module = DistributedDataParallel(net)
        else:
            for layer in (net.encoder, net.equilibrium, net.head):
                fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
            wrapped = fully_shard(net, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))  # pyright: ignore
        wrapped(mine).square().sum().backward()
        found = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in net.parameters()]
        steps = net.equilibrium.last_solution.num_steps
        torch.save({"gradients": found, "steps": steps}, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_give_the_gradients_of_one(how: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_train_on_one_rank, (port, how, tmp_path, "warn"), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert not torch.equal(results[0]["steps"].max(), results[1]["steps"].max())

    torch.manual_seed(0)
    net = Net(rtol=1e-6)
    inputs = torch.randn(4, 6)
    inputs[2:] *= 20
    expected = [g / 2 for g in gradients(net, net(inputs))]  # the mean over ranks
    for result in results:
        torch.testing.assert_close(result["gradients"], expected, rtol=1e-3, atol=1e-5)
