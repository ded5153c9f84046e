"""A solve of a fixed number of steps can be captured in a CUDA graph: on the way the host looks at nothing.

Without a GPU this is seen with fake tensors, which have a device but no values: every look at one is an error, and
every operation goes through `NothingWaits`. What needs a GPU is skipped where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deqkit

SOLVERS = ("fixed_point", "anderson", "broyden", "newton_krylov", "auto", "reversible")
ADJOINTS = ("implicit", "neumann", "jfb", "phantom", "unrolled")
FIXED: dict[str, Any] = {"rtol": 0.0, "atol": 0.0, "max_steps": 6, "on_failure": "ignore"}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# These wait for the device although they return tensors: a size that depends on values, or an error that is raised.
WAITING = ("nonzero", "masked_select", "unique", "_linalg_check_errors", "_assert_async")


class NothingWaits(TorchDispatchMode):
    """Refuses operations for which the host waits: copies to or from it, and those in `WAITING`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and t.dim()]
        assert len({t.device.type for t in tensors}) < 2, f"{func} copies between host and device"
        assert not func.name().split("::")[1].startswith(WAITING), f"{func} waits for the device"
        if func.name().startswith("aten::index"):
            masks = [t for t in tree_leaves(args[1:]) if isinstance(t, Tensor) and t.dtype is torch.bool]
            assert not masks, f"{func} by a mask waits for the device"
        return out


@contextmanager
def capturing() -> Iterator[None]:
    """What a solve is told of CUDA while a graph is captured."""
    with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
        yield


def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(x @ w + b)


def made(device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    w, b = 0.2 * torch.randn(8, 8, generator=generator), torch.randn(3, 8, generator=generator)
    return torch.zeros(3, 8, device=device), w.to(device), b.to(device)


@pytest.mark.parametrize("solver", SOLVERS)
def test_fixed_steps_look_at_nothing(solver: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), capturing(), torch.no_grad():
        x0, w, b = (torch.empty(shape, device="cuda") for shape in ((3, 8), (8, 8), (3, 8)))
        with NothingWaits():
            sol = deqkit.solve(f, x0, args=(w, b), solver=solver, trace=True, keep=(2,), **FIXED)
    assert sol.value.device.type == sol.status.device.type == "cuda" and sol.value.shape == (3, 8)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_gradients_of_fixed_steps_look_at_nothing(solver: str, adjoint: str) -> None:
    chosen = deqkit.ImplicitAdjoint(solver, rtol=0.0, max_steps=5) if adjoint == "implicit" else adjoint
    x0, w, b = (torch.empty(shape, device="meta") for shape in ((3, 8), (8, 8), (3, 8)))
    with NothingWaits():
        sol = deqkit.solve(f, x0, args=(w.requires_grad_(), b), solver=solver, adjoint=chosen, **FIXED)
        (grad,) = torch.autograd.grad(sol.value.sum(), w)
    assert grad.shape == w.shape


def test_a_look_would_be_seen() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, device="cuda")
        with pytest.raises(Exception, match=r"aten\._local_scalar_dense"):
            bool(x.sum() > 0)
        with NothingWaits():
            for wait in (lambda: x.cpu(), lambda: torch.arange(3).to(x.device), lambda: x[x > 0], lambda: x.nonzero()):
                with pytest.raises(Exception, match="waits|copies|nonzero"):
                    wait()


@pytest.mark.parametrize("tolerance", ["rtol", "atol"])
def test_a_tolerance_is_refused_while_a_graph_is_captured(tolerance: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), capturing():
        x0, w, b = (torch.empty(shape, device="cuda") for shape in ((3, 8), (8, 8), (3, 8)))
        settings: dict[str, Any] = FIXED | {tolerance: 1e-3}
        with pytest.raises(RuntimeError, match="CUDA graph is captured: fix the number of steps with rtol=0"):
            deqkit.solve(f, x0, args=(w, b), **settings)


@needs_gpu
@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_a_captured_solve_is_replayed(solver: str) -> None:
    x0, w, b = made("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        deqkit.solve(f, x0, args=(w, b), solver=solver, **FIXED)  # libraries are set up outside of the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        sol = deqkit.solve(f, x0, args=(w, b), solver=solver, **FIXED)
    b.copy_(torch.linspace(-1, 1, b.numel(), device="cuda").reshape(b.shape))
    graph.replay()
    expected = deqkit.solve(f, x0, args=(w, b), solver=solver, **FIXED)
    torch.testing.assert_close(sol.value, expected.value)
    torch.testing.assert_close(sol.residual, expected.residual)


@needs_gpu
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_values_and_gradients_are_those_of_the_cpu(solver: str, adjoint: str) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        x0, w, b = (t.double() for t in made(device))
        settings: dict[str, Any] = {"rtol": 1e-10, "max_steps": 60} if adjoint != "unrolled" else FIXED
        sol = deqkit.solve(f, x0, args=(w.requires_grad_(), b), solver=solver, adjoint=adjoint, **settings)
        (grad,) = torch.autograd.grad(sol.value.square().sum(), w)
        found[device] = [t.cpu() for t in (sol.value, sol.status, sol.num_steps, grad)]
    for got, expected in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
