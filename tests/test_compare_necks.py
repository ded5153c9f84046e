"""The benchmark of both necks: rows of one table are of equal budgets."""

import importlib
import sys
import warnings
from pathlib import Path

import pytest
import torch

import deqkit
from adapters.detection import ImplicitFPN
from adapters.detection.training import load_checkpoint

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def compare(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("compare_necks")
    trained = []

    def train(args, detector, neck, seed):
        trained.append((detector, neck, seed))
        return module.Row(detector, neck, seed, args.steps, 0.5, 0.7, 0.1, 3.0, 1.0, 0, 12.5)

    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(sys, "argv", ["compare_necks.py"])
    yield lambda *more: module.main(["--detectors", "atss", f"--out={tmp_path}", *more]), trained
    del sys.modules["compare_necks"]


def test_what_was_trained_is_not_trained_again(compare, capsys):
    main, trained = compare
    main("--seeds", "0")
    assert len(main("--seeds", "0", "1")) == 4 and len(trained) == 4
    assert "0.500 +- 0.000" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["--steps=3", "--lr=0.1", "--image-size=64", "--backbone=resnet50", "--w-scale=2.0"])
def test_rows_of_other_settings_are_not_mixed_in(compare, change):
    main, trained = compare
    main("--seeds", "0")
    with pytest.raises(SystemExit, match="holds rows of " + change.split("=")[0]):
        main("--seeds", "0", "1", change)
    assert len(trained) == 2


def test_rows_from_before_there_was_a_setting_are_not_mixed_in(compare, tmp_path):
    main, _ = compare
    (tmp_path / "rows.csv").write_text("detector,neck,seed,steps\natss,fpn,0,400\n")
    with pytest.raises(SystemExit, match="holds rows of"):
        main("--seeds", "0")


def test_ways_to_solve_are_necks(compare, capsys):
    main, trained = compare
    main("--seeds", "0", "--necks", "paper", "1e-1/neumann-2")
    assert trained == [("atss", "paper", 0), ("atss", "1e-1/neumann-2", 0)]
    assert "1e-1/neumann-2" in capsys.readouterr().out
    for words in (["--necks", "bifpn"], ["--w-scale", "0"], ["--w-scale", "nan"]):
        with pytest.raises(SystemExit):
            main(*words)


def test_a_training_says_what_it_called_g_for(monkeypatch, tmp_path):
    """One that takes two steps, forward and backward, and is kept."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("compare_necks")
    two = deqkit.ImplicitAdjoint("fixed_point", rtol=0.0, max_steps=2)
    monkeypatch.setitem(
        module.SOLVES, "two/steps", {"preset": "paper", "max_steps": 2, "adjoint": two, "solver": "anderson"}
    )
    arguments = ["--necks", "fpn", "two/steps", "--detectors", "retinanet", "--steps", "3", "--batch-size", "2"]
    arguments += ["--train-images", "8", "--val-images", "2", "--image-size", "64", "--channels", "16"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fpn, own = module.main([*arguments, "--seeds", "0", "--checkpoints", f"--out={tmp_path}"])
    assert (fpn.calls, own.calls) == (0, 4 + 4 + 1)  # both solves look at the last step, both are gone through again
    kept = load_checkpoint(tmp_path / "retinanet_two_steps_0.ckpt")
    assert kept.config.neck_settings == {"preset": "paper"} and isinstance(kept.neck, ImplicitFPN)
    assert (tmp_path / "retinanet_fpn_0.ckpt").exists()


def test_weights_of_the_cross_scale_connection_are_scaled(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("compare_necks")
    neck = ImplicitFPN([8, 8], 8)
    before = {name: p.detach().clone() for name, p in neck.named_parameters()}
    module.scale_w_(neck, 2.0)
    for name, p in neck.named_parameters():
        assert torch.equal(p, before[name] * (2 if "cross_scale" in name else 1))
