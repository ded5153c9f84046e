"""The guard: modules inside f that leave it without a fixed point are found, named, and a remedy is given."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torchvision import ops

import deqkit
from deqkit.nn import check_module, fixed_point


class Block(nn.Module):
    """A part somewhere inside f that keeps the shape of x."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Identity(), part)

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * self.body(x)


FOUND_IN_TRAINING: dict[str, tuple[Any, str]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), "GroupNorm or LayerNorm"),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), "GroupNorm or LayerNorm"),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), "GroupNorm or LayerNorm"),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), "track_running_stats=False"),
    "Dropout": (lambda: nn.Dropout(0.1), "deqkit.nn.VariationalDropout"),
    "Dropout2d": (lambda: nn.Dropout2d(0.1), "deqkit.nn.VariationalDropout"),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.1), "deqkit.nn.VariationalDropout"),
    "StochasticDepth": (lambda: ops.StochasticDepth(0.1, "row"), "deqkit.nn.VariationalDropout"),
    "DropBlock2d": (lambda: ops.DropBlock2d(0.1, 3), "deqkit.nn.VariationalDropout"),
    "LSTM": (lambda: nn.LSTM(4, 4, num_layers=2, dropout=0.1), "set its dropout to 0"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2, dropout=0.1), "set its dropout to 0"),
    "RReLU": (lambda: nn.RReLU(), "LeakyReLU"),
    "Linear": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "deqkit.nn.spectral_norm"),
}
FOUND_ALWAYS: dict[str, tuple[Any, str]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4, track_running_stats=False), "GroupNorm or LayerNorm"),
    "FractionalMaxPool2d": (lambda: nn.FractionalMaxPool2d(2, output_size=2), "AdaptiveMaxPool"),
}
FINE: list[Any] = [
    lambda: nn.GroupNorm(2, 4),
    lambda: nn.LayerNorm(4),
    lambda: nn.InstanceNorm2d(4),
    lambda: nn.Dropout(0.0),
    lambda: ops.StochasticDepth(0.0, "row"),
    lambda: nn.LSTM(4, 4, num_layers=2),
    lambda: nn.MultiheadAttention(4, 2),
    lambda: nn.RReLU(0.2, 0.2),
    lambda: ops.FrozenBatchNorm2d(4),
    lambda: deqkit.nn.VariationalDropout(0.5),
    lambda: deqkit.nn.spectral_norm(nn.Linear(4, 4)),
    lambda: deqkit.nn.weight_norm(nn.Linear(4, 4)),
    lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    lambda: nn.FractionalMaxPool2d(2, output_size=2, _random_samples=torch.rand(1, 1, 2)),
]


@pytest.mark.parametrize("kind", FOUND_IN_TRAINING)
def test_found_in_training_mode(kind: str) -> None:
    make, remedy = FOUND_IN_TRAINING[kind]
    block = Block(make())
    (finding,) = check_module(block)
    assert finding.name == "body.1" and finding.module is block.body[1]
    assert str(finding).startswith(f"body.1 ({kind}) ") and remedy in str(finding)
    assert not check_module(block.eval())
    block.train().body[1].eval()  # frozen by itself
    assert not check_module(block)


@pytest.mark.parametrize("kind", FOUND_ALWAYS)
def test_found_in_both_modes(kind: str) -> None:
    make, remedy = FOUND_ALWAYS[kind]
    for block in (Block(make()), Block(make()).eval()):
        (finding,) = check_module(block)
        assert kind in str(finding) and remedy in finding.remedy
    assert "the module itself" in str(check_module(make())[0])


@pytest.mark.parametrize("make", FINE)
def test_no_false_alarm(make: Any) -> None:
    assert check_module(Block(make())) == []


def test_the_spectral_norm_of_torch_is_found_unless_it_is_held() -> None:
    block = Block(parametrizations.spectral_norm(nn.Linear(4, 4)))
    (finding,) = check_module(block)
    assert finding.name == "body.1.parametrizations.weight" and "deqkit.nn.spectral_norm" in finding.remedy
    with deqkit.nn.hold(block):
        pass
    assert check_module(block) == []


def test_every_module_is_found() -> None:
    block = nn.ModuleDict({"a": Block(nn.Dropout()), "b": Block(nn.BatchNorm2d(2))})
    assert [f.name for f in check_module(block)] == ["a.body.1", "b.body.1"]
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got function"):
        check_module(lambda x: x)  # pyright: ignore[reportArgumentType]


def warnings_of(layer: nn.Module, times: int = 1) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            layer(torch.zeros(3, 4))
    return [w for w in caught if not issubclass(w.category, deqkit.ConvergenceWarning)]


def test_the_layer_warns_once() -> None:
    layer = deqkit.nn.FixedPoint(Block(nn.BatchNorm1d(4)), on_failure="ignore")
    assert not warnings_of(layer.eval())
    (warning,) = warnings_of(layer.train(), times=3)
    assert warning.filename == __file__ and "body.1 (BatchNorm1d)" in str(warning.message)
    assert "check=False silences this" in str(warning.message)
    other = deqkit.nn.FixedPoint(layer.module, on_failure="ignore")
    assert len(warnings_of(other)) == 1  # per instance
    assert not warnings_of(copy.deepcopy(layer))  # which has said it


def test_the_layer_is_silent_where_it_should() -> None:
    assert not warnings_of(deqkit.nn.FixedPoint(Block(nn.BatchNorm1d(4)), on_failure="ignore", check=False))
    assert not warnings_of(deqkit.nn.FixedPoint(Block(nn.GroupNorm(2, 4))))
    assert not warnings_of(deqkit.nn.FixedPoint(Block(nn.Linear(4, 4))))
    with pytest.raises(TypeError, match="check must be True or False, got 'yes'"):
        deqkit.nn.FixedPoint(nn.Identity(), check="yes")  # pyright: ignore[reportArgumentType]


def test_the_check_costs_nothing_after_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(fixed_point, "check_module", lambda module: calls.append(module) or [])
    layer = deqkit.nn.FixedPoint(nn.Identity())
    for _ in range(3):
        layer(torch.zeros(2, 2))
    assert calls == [layer.module]


def test_parametrisations_registered_after_the_layer_was_made_are_held() -> None:
    layer = deqkit.nn.FixedPoint(Block(nn.Linear(4, 4)))
    parametrizations.spectral_norm(layer.module.body[1])  # pyright: ignore
    assert parametrize.is_parametrized(layer.module.body[1])  # pyright: ignore
    assert not warnings_of(layer) and layer.last_solution.converged.all()
