"""A compiled G inside of a neck that is not: same results, at any size, in either mode, with all that belongs to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import deqkit
from adapters.detection import ImplicitFPN

CHANNELS = 8
# Traces forward and backward as any backend, without generating code.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()


def features(height: int = 12, width: int = 16, levels: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(height * width)
    sizes = [(-(-height // 2**j), -(-width // 2**j)) for j in range(levels)]
    maps = [torch.randn(2, CHANNELS, *size, generator=generator) for size in sizes]
    return {str(j): x.requires_grad_() for j, x in enumerate(maps)}


def twins(levels: int = 2, **settings: Any) -> tuple[ImplicitFPN, ImplicitFPN]:
    """A neck, and the same with a compiled G."""
    neck = ImplicitFPN([CHANNELS] * levels, CHANNELS, on_failure="ignore", **settings)
    other = copy.deepcopy(neck)
    other.transform.compile(backend=BACKEND, dynamic=True)
    return neck, other


def run(neck: nn.Module, x: dict[str, Tensor]) -> list[Tensor]:
    """The pyramid and all gradients."""
    tensors = [*x.values(), *neck.parameters()]
    for t in tensors:
        t.grad = None
    torch.manual_seed(1)
    out = list(neck(x).values())
    sum((o.square().mean() for o in out), start=torch.zeros(())).backward()
    return out + [t.grad for t in tensors]  # pyright: ignore


def check_alike(neck: nn.Module, other: nn.Module, x: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    for a, b in zip(run(other, x), run(neck, x), strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-6


def test_a_training_at_several_sizes() -> None:
    """From the second size on shapes are dynamic; from the third on, here, what is compiled fits any size."""
    neck, other = twins(preset="accurate")
    other.transform.compile(backend=BACKEND)
    for size in ((12, 16), (10, 14), (9, 20)):
        check_alike(neck, other, features(*size))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0 and not counters["graph_break"]
    check_alike(neck, other, features(11, 18))
    assert counters["stats"]["unique_graphs"] == graphs


HELD = {"weight_norm": True, "dropout": 0.3}
OLD = pytest.mark.skipif(torch.__version__ < "2.15", reason="PyTorch 2.11 computes a held weight wrongly in eval mode")


@pytest.mark.parametrize("settings", [{"unroll": 2}, {"out_norm": "ibn"}, pytest.param(HELD, marks=OLD)], ids=str)
def test_designs_in_both_modes(settings: dict[str, Any]) -> None:
    neck, other = twins(levels=1, **settings)
    x = features(levels=1)
    check_alike(neck, other, x)
    for (name, a), b in zip(other.state_dict().items(), neck.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)  # running statistics among them
    neck.eval(), other.eval()
    with torch.no_grad():
        for a, b in zip(other(x).values(), neck(x).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16() -> None:
    """Fused operations round less often than those that are carried out one by one."""
    neck, other = twins(levels=1, autocast="bfloat16")
    found, expected = (run(n, features(levels=1)) for n in (other, neck))
    assert all(o.dtype == torch.float32 for o in found)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm() + 1e-6


def test_masks_are_held() -> None:
    """Weights computed and masks drawn once per solve, in eager evaluations outside as in compiled ones inside."""
    _, other = twins(levels=1, dropout=0.5, weight_norm=True, rtol=1e-5, max_steps=60)
    x = features(levels=1)
    out = list(other(x).values())
    again = list(other(x).values())
    assert any(not torch.equal(a, b) for a, b in zip(out, again, strict=True))
    with deqkit.nn.hold():
        first, second = (list(other(x).values()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    basis = [block(f) for block, f in zip(other.inner_blocks, x.values(), strict=True)]
    with torch.no_grad(), deqkit.nn.hold(solution=other.last_solution):
        for p, g in zip(second, other.module(second, basis), strict=True):
            torch.testing.assert_close(g, p, rtol=1e-3, atol=1e-4)


def test_copies_and_state() -> None:
    """The state dict is that of the neck as it was; a copy is not compiled, and can be."""
    neck, other = twins(levels=1)
    assert list(other.state_dict()) == list(neck.state_dict())
    x = features(levels=1)
    run(other, x)
    copied = copy.deepcopy(other)
    assert copied.transform._compiled_call_impl is None
    check_alike(copied, other, x)
    copied.transform.compile(backend=BACKEND, dynamic=True)
    with torch.no_grad():
        for p in neck.parameters():
            p.mul_(1.1)
    copied.load_state_dict(neck.state_dict())
    check_alike(neck, copied, x)


def test_a_compiled_neck() -> None:
    """All of it, in place: laterals and extra levels are compiled, and the solve to a tolerance runs as it is."""
    neck, _ = twins(levels=1)
    other = copy.deepcopy(neck)
    other.compile(backend=BACKEND, dynamic=True)
    for size in ((12, 16), (10, 14)):
        check_alike(neck, other, features(*size, levels=1))
    assert other.last_solution is not None and other.last_solution.converged.all()
