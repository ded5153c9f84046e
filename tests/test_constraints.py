"""Weight norm and spectral norm with a cap."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import deqkit

Wrap = Callable[[nn.Module], nn.Module]

WRAPS: dict[str, Wrap] = {
    "weight_norm": lambda m: deqkit.nn.weight_norm(m, 0.3),
    "spectral_norm": lambda m: deqkit.nn.spectral_norm(m, 0.6),
    "both": lambda m: deqkit.nn.spectral_norm(deqkit.nn.weight_norm(m), 0.6),
    "torch": parametrizations.orthogonal,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def operator_norm(module: nn.Module, *shape: int) -> float:
    """Of a linear module on inputs of this shape, by its dense matrix."""
    size = torch.Size(shape).numel()
    eye = torch.eye(size, dtype=next(module.parameters()).dtype)
    with torch.no_grad():
        return torch.linalg.matrix_norm(module(eye.reshape(size, *shape)).reshape(size, -1).double(), 2).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (5, 3), (16, 16), (90, 60)])
def test_spectral_norm_of_a_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer = nn.Linear(shape[1], shape[0], dtype=dtype)
    within = (0.9 * layer.weight / torch.linalg.matrix_norm(layer.weight, 2)).detach()
    deqkit.nn.spectral_norm(layer, 0.92)
    layer.weight = within
    assert torch.equal(layer.weight, within)  # left as it is
    layer.weight = 7 * within
    norm = torch.linalg.matrix_norm(layer.weight, 2).item()
    assert 0.99 * 0.92 <= norm <= 0.92 * (1 + 1e-6)
    torch.testing.assert_close(layer.weight / norm, within / 0.9, rtol=1e-5, atol=1e-6)  # scaled, and not bent


def test_spectral_norm_of_equal_singular_values() -> None:
    """The worst case of the bound."""
    layer = nn.Linear(64, 64)
    nn.init.orthogonal_(layer.weight)
    deqkit.nn.spectral_norm(layer, 0.9)
    assert 0.99 * 0.9 <= torch.linalg.matrix_norm(layer.weight, 2).item() <= 0.9 * (1 + 1e-6)


CONVOLUTIONS = [
    (cls, kernel, stride, dilation, groups, mode, bound)
    for cls, kernel, stride, dilation, groups, mode, bound in itertools.product(
        (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d), (1, 2, 3), (1, 2, 3), (1, 2), (1, 2), ("zeros", "circular"),
        ("fourier", "reshaped"),
    )
    if mode == "zeros" or cls is not nn.ConvTranspose2d
]  # fmt: skip


@pytest.mark.parametrize("cls", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d])
def test_spectral_norm_of_a_convolution_as_an_operator(cls: type[nn.Module]) -> None:
    """Its dense matrix stays within the cap, whatever its settings, and with the sharper bound not far from it."""
    ratios = []
    for _, kernel, stride, dilation, groups, mode, bound in (case for case in CONVOLUTIONS if case[0] is cls):
        settings = {"stride": stride, "dilation": dilation, "groups": groups, "padding": (kernel - 1) * dilation // 2}
        conv: Any = cls(4, 2, kernel, padding_mode=mode, bias=False, **settings)
        weight = torch.randn_like(conv.weight)
        deqkit.nn.spectral_norm(conv, 0.7, conv_bound=bound)
        conv.weight = 3 * weight
        norm = operator_norm(conv, 4, *([13] if cls is nn.Conv1d else [8, 7]))
        assert norm <= 0.7 * (1 + 1e-6), (kernel, settings, mode, bound)
        if bound == "fourier" and stride == dilation == 1:
            ratios.append(norm / 0.7)
    assert min(ratios) > 0.8  # the image is small: on a larger one, see below


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_the_bound_of_a_convolution_is_sharp_for_large_images(mode: Any) -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode, bias=False, dtype=torch.float64)
    deqkit.nn.spectral_norm(conv, 0.7)
    conv.weight = 5 * torch.randn_like(conv.weight)
    norms = [operator_norm(conv, 2, size, size) for size in (3, 6, 24)]
    assert norms[0] < norms[1] < norms[2] < 0.7 if mode == "zeros" else all(n < 0.7 for n in norms)
    assert norms[2] > 0.94 * 0.7


def test_the_bound_counts_what_lies_between_the_frequencies_of_its_grid() -> None:
    """Taps that rotate by half a step of the grid: the symbol is largest right between two of its points."""
    step = torch.tensor(math.pi / 16, dtype=torch.float64)
    taps = [torch.stack([(t * step).cos(), -(t * step).sin(), (t * step).sin(), (t * step).cos()]) for t in range(3)]
    conv = nn.Conv1d(2, 2, 3, padding=1, bias=False, dtype=torch.float64)
    conv.weight.data.copy_(torch.stack(taps, 1).reshape(2, 2, 3))
    assert operator_norm(conv, 2, 200) > 2.99
    deqkit.nn.spectral_norm(conv, 1.0)
    assert 0.97 < operator_norm(conv, 2, 200) <= 1


def test_the_norm_of_the_reshaped_weight_would_be_no_bound() -> None:
    """What torch divides by: a kernel of ones lets the operator be three times as large."""
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(conv.weight)
    torchs = parametrizations.spectral_norm(copy.deepcopy(conv))
    assert operator_norm(torchs, 1, 12, 12) > 2.5
    assert 0.9 < operator_norm(deqkit.nn.spectral_norm(conv, 1.0), 1, 12, 12) <= 1 + 1e-6


@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_weight_norm_caps_lengths(dim: int | None) -> None:
    weight = torch.randn(4, 3, 2, 2) * torch.tensor([0.01, 1.0, 10.0, 0.0])[:, None, None, None]
    conv = nn.Conv2d(3, 4, 2)
    conv.weight.data.copy_(weight)
    deqkit.nn.weight_norm(conv, 0.5, dim=dim)
    dims = list(range(4)) if dim is None else [d for d in range(4) if d != dim % 4]
    before = torch.linalg.vector_norm(weight, dim=dims)
    torch.testing.assert_close(torch.linalg.vector_norm(conv.weight, dim=dims), before.clamp(max=0.5))
    if dim == 0:
        torch.testing.assert_close(conv.weight[0], weight[0])  # within the cap: left as it is
        conv(torch.randn(1, 3, 5, 5)).sum().backward()  # zeros are no dead end
        grad = conv.parametrizations["weight"].original0.grad  # pyright: ignore
        assert grad.isfinite().all() and grad[3] != 0


def test_weight_norm_without_cap_is_that_of_torch() -> None:
    ours, theirs = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    deqkit.nn.weight_norm(ours)
    parametrizations.weight_norm(theirs)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.weight, theirs.weight)
    with torch.no_grad():
        ours.parametrizations["weight"].original0.mul_(-2)  # pyright: ignore
    torch.testing.assert_close(ours.weight, -2 * theirs.weight)


@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm"])
def test_a_weight_beyond_its_cap_comes_back_by_assignment(wrap: str) -> None:
    """Its gradient cannot shrink it (that is its true derivative); assigned to itself it sits at the cap, and can."""
    layer: Any = nn.Linear(4, 4, bias=False)
    WRAPS[wrap](layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(10)
    target = 0.1 * layer.weight.detach()

    def train(project: bool) -> float:
        mine = copy.deepcopy(layer)
        optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            (mine.weight - target).square().sum().backward()
            optimizer.step()
            if project:
                mine.weight = mine.weight
        return (mine.weight - target).norm().item()

    assert train(project=True) < 1e-3 < 0.1 < train(project=False)


@pytest.mark.parametrize("wrap", WRAPS)
def test_derivatives_of_the_weight(wrap: str) -> None:
    layer: Any = WRAPS[wrap](nn.Linear(4, 4, dtype=torch.float64))
    with torch.no_grad():  # away from the caps, where there is no derivative
        for p in layer.parameters():
            p.add_(0.05 * torch.randn_like(p))
    names = [name for name, _ in layer.parametrizations.weight.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parametrizations.weight.parameters()]
    f = lambda *ps: functional_call(layer.parametrizations.weight, dict(zip(names, ps, strict=True)), ())  # noqa: E731
    assert torch.autograd.gradcheck(f, values) and torch.autograd.gradgradcheck(f, values)


@pytest.mark.parametrize("bound", ["fourier", "reshaped"])
def test_derivatives_of_the_weight_of_a_convolution(bound: Any) -> None:
    conv: Any = deqkit.nn.spectral_norm(nn.Conv2d(2, 2, 3, dtype=torch.float64), 0.3, conv_bound=bound)
    original = (2 * conv.parametrizations.weight.original).detach().requires_grad_()
    f = lambda w: functional_call(conv.parametrizations.weight, {"original": w}, ())  # noqa: E731
    assert torch.autograd.gradcheck(f, original) and torch.autograd.gradgradcheck(f, original)


def test_a_weight_of_zeros_has_a_gradient() -> None:
    for module in (nn.Linear(3, 3), nn.Conv2d(2, 2, 3)):
        nn.init.zeros_(module.weight)
        deqkit.nn.spectral_norm(module, 0.5)
        assert not module.weight.any()
        module.weight.sum().backward()
        assert (next(module.parametrizations.parameters()).grad == 1).all()  # pyright: ignore


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    layer = deqkit.nn.spectral_norm(nn.Linear(64, 64), 0.5).to(dtype)
    layer.weight = torch.randn(64, 64, dtype=dtype)
    assert layer.weight.dtype == dtype
    assert torch.linalg.matrix_norm(layer.weight.double(), 2) <= 0.5 * (1 + torch.finfo(dtype).eps)
    slices = deqkit.nn.weight_norm(nn.Linear(64, 64), 0.5).to(dtype)
    assert slices.weight.dtype == dtype and slices.weight.double().norm(dim=1).max() <= 0.5 * (
        1 + torch.finfo(dtype).eps
    )
    full = deqkit.nn.spectral_norm(nn.Linear(64, 64), 0.1)
    with torch.autocast("cpu", dtype):
        assert full.weight.dtype == torch.float32 and torch.equal(full.weight, full.double().weight.float())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: deqkit.nn.spectral_norm(nn.Linear(2, 2), 0.0), ValueError, "cap must be positive and finite, got 0.0"),
        (lambda: deqkit.nn.spectral_norm(nn.Linear(2, 2), "1"), TypeError, "cap must be a number, got '1'"),
        (lambda: deqkit.nn.spectral_norm(nn.Linear(2, 2), name="w"), ValueError, "Linear has no parameter or buffer"),
        (lambda: deqkit.nn.spectral_norm(nn.LayerNorm(2)), ValueError, "spectral_norm takes a matrix"),
        (lambda: deqkit.nn.spectral_norm(nn.Bilinear(2, 2, 2)), ValueError, r"of Bilinear has shape \(2, 2, 2\)"),
        (lambda: deqkit.nn.spectral_norm(nn.LazyLinear(2)), ValueError, "is not initialised yet"),
        (
            lambda: deqkit.nn.spectral_norm(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")),
            ValueError,
            "padding_mode='reflect' is not bounded here: use 'zeros' or 'circular'",
        ),
        (
            lambda: deqkit.nn.spectral_norm(nn.Conv2d(1, 1, 3, padding=2, padding_mode="circular")),
            ValueError,
            "makes the image larger",
        ),
        (
            lambda: deqkit.nn.spectral_norm(nn.Conv2d(1, 1, 3), conv_bound="exact"),  # pyright: ignore
            ValueError,
            "unknown conv_bound 'exact': choose one of",
        ),
        (lambda: deqkit.nn.weight_norm(nn.Linear(2, 2), dim=2), ValueError, "within the 2 dims of the weight, got 2"),
        (
            lambda: deqkit.nn.weight_norm(deqkit.nn.spectral_norm(nn.Linear(2, 2))),
            ValueError,
            "'weight' is parametrised already",
        ),
        (lambda: deqkit.nn.weight_norm(torch.tanh), TypeError, "module must be a torch.nn.Module"),  # pyright: ignore
        (lambda: deqkit.nn.hold(torch.tanh).__enter__(), TypeError, "hold takes modules"),  # pyright: ignore
    ],
)
def test_what_cannot_be_capped_is_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
