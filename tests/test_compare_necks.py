"""The benchmark of both necks: rows of one table are of equal budgets."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def compare(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("compare_necks")
    trained = []

    def train(args, detector, neck, seed):
        trained.append((detector, neck, seed))
        return module.Row(detector, neck, seed, args.steps, 0.5, 0.7, 0.1, 3.0, 1.0, 0)

    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(sys, "argv", ["compare_necks.py"])
    yield lambda *more: module.main(["--detectors", "atss", f"--out={tmp_path}", *more]), trained
    del sys.modules["compare_necks"]


def test_what_was_trained_is_not_trained_again(compare, capsys):
    main, trained = compare
    main("--seeds", "0")
    assert len(main("--seeds", "0", "1")) == 4 and len(trained) == 4
    assert "0.500 +- 0.000" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["--steps=3", "--lr=0.1", "--image-size=64", "--backbone=resnet50"])
def test_rows_of_other_settings_are_not_mixed_in(compare, change):
    main, trained = compare
    main("--seeds", "0")
    with pytest.raises(SystemExit, match="holds rows of " + change.split("=")[0]):
        main("--seeds", "0", "1", change)
    assert len(trained) == 2
