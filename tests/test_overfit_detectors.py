"""benchmarks/overfit_detectors.py: it runs, and what it trains learns."""

import pytest
from benchmark_modules import benchmark_modules

SMALL = ["--images", "2", "--image-size", "64"]


@pytest.fixture(scope="module")
def overfit():
    with benchmark_modules("overfit_detectors") as modules:
        yield modules["overfit_detectors"]


def test_a_row_per_detector_neck_and_seed(overfit, capsys):
    rows = overfit.main([*SMALL, "--detectors", "retinanet", "atss", "--steps", "1"])
    rows += overfit.main([*SMALL, "--detectors", "atss", "--necks", "ifpn", "--steps", "1", "--seeds", "3"])
    both = [(detector, neck, 0) for detector in ("retinanet", "atss") for neck in ("fpn", "ifpn")]
    assert [(row["detector"], row["neck"], row["seed"]) for row in rows] == [*both, ("atss", "ifpn", 3)]
    assert all(("residual" in row) == (row["neck"] == "ifpn") and 0 <= row["AP"] <= 1 for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith(("retinanet ", "atss "))]) == len(rows)


def test_an_unknown_detector_is_refused(overfit, capsys):
    with pytest.raises(SystemExit):
        overfit.main(["--detectors", "yolo"])
    assert "autoassign" in capsys.readouterr().err
