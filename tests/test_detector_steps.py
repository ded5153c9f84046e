"""How many steps does i-FPN need: the sweep over solver steps, its answer, and the small detector that is kept."""

import csv
import json
import sys

import pytest
import torch
from benchmark_modules import benchmark_modules
from PIL import Image

import deqkit


@pytest.fixture(scope="module")
def modules():
    """The benchmarks' modules."""
    names = ("options", "detector_steps", "detector_report", "small_detector", "compare_necks", "solver_iters")
    with benchmark_modules(*names) as found:
        yield found


def save_detector(folder, **config):
    """A small set of images and the checkpoint of an untrained detector for it."""
    from adapters.detection.data import SyntheticSettings, generate_dataset
    from adapters.detection.training import DetectionModule, DetectorConfig, Schedule

    root = folder / "data"
    generate_dataset(root, SyntheticSettings(train_images=1, val_images=5, image_size=96), progress=False)
    torch.manual_seed(0)
    settings = {"num_classes": 5, "neck_channels": 16, "image_size": 96, "neck_settings": {"max_steps": 4}} | config
    module = DetectionModule(DetectorConfig(**settings), Schedule(1), data={"root": str(root)})
    path = folder / "model.ckpt"
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


@pytest.fixture
def detector(modules, tmp_path):
    return modules["detector_steps"].load(save_detector(tmp_path), None, 2, "cpu")


def test_detector_sweep(modules, tmp_path, capsys):
    checkpoint, out = save_detector(tmp_path), tmp_path / "out"
    solvers = ["fixed_point", "anderson:history=2", "unroll"]
    arguments = ["--only=detector", f"--detector={checkpoint}", "--steps=0,1,4,12", f"--out={out}"]
    assert modules["solver_iters"].main([*arguments, *(f"--solver={name}" for name in solvers)]) == 0
    with (out / "detector.csv").open() as file:
        rest, own, *rows = csv.DictReader(file)
    assert (rest["solver"], rest["steps"], rest["error_worst"]) == ("at rest", "", "")
    assert float(rest["residual_worst"]) < 1e-8 and rest["seconds_per_image"] == ""
    assert own["solver"] == "own settings" and 1 <= float(own["mean_steps"]) <= 4
    assert 1e-4 < float(own["error_median"]) < 0.1  # its tolerance is 1e-2
    steps = ("0", "1", "4", "12")
    assert [(row["solver"], row["steps"]) for row in rows] == [(label, k) for label in solvers for k in steps]
    for row in rows:
        assert float(row["mean_steps"]) == int(row["steps"])
        assert row["images"] == "5" and 0 <= float(row["ap"]) <= float(row["ap50"]) <= 1
        assert float(row["seconds_per_image"]) > 0
        assert float(row["error_worst"]) >= float(row["error_median"]) > 0
        assert (row["residual_median"] == "") == (row["solver"] == "unroll" or row["steps"] == "0")
    plain, accelerated, unrolled = rows[:4], rows[4:8], rows[8:]
    for mine in (plain, accelerated, unrolled):
        errors = [float(row["error_median"]) for row in mine]
        assert errors[1] > 10 * errors[2] > 100 * errors[3] and errors[3] < 1e-4
        assert errors[0] == float(plain[0]["error_median"])  # there is nothing to choose between solvers
    for a, b in zip(plain, unrolled, strict=True):
        assert float(a["error_median"]) == pytest.approx(float(b["error_median"]), rel=1e-3, abs=1e-6)
    text = capsys.readouterr().out
    assert "retinanet with resnet18 and 16 channels, 5 images" in text and "Spectral radius of dG/dP at rest" in text
    assert "fixed_point: AP is 0" in text or "enough" in text
    record = json.loads((out / "detector.json").read_text())
    assert record["settings"]["images"] == 5 and len(record["spectral_radii"]) == 5 and record["hardware"]["cpu"]
    assert Image.open(out / "detector.png").width > 1000


def test_detector_neck_is_left_as_it_was(modules, detector):
    neck, steps = detector.neck, modules["detector_steps"]
    detector.model.train()
    before, weights = neck.settings, {k: v.clone() for k, v in detector.model.state_dict().items()}
    hooks = len(neck._forward_hooks), len(neck._forward_pre_hooks), len(neck.module._forward_pre_hooks)
    rows = steps.sweep(detector, modules["options"].default_solvers()[2:], [3], lambda: None)
    steps.spectral_radii(detector)
    assert neck.settings == before and neck.unroll is None and detector.model.training
    assert hooks == (len(neck._forward_hooks), len(neck._forward_pre_hooks), len(neck.module._forward_pre_hooks))
    after = detector.model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in weights.items())
    assert [row.images for row in rows] == [2, 2, 2]


def test_the_neck_is_left_as_it_was_by_a_sweep_that_fails(modules, detector):
    def stop():
        raise KeyboardInterrupt

    before = detector.neck.settings
    with pytest.raises(KeyboardInterrupt):
        modules["detector_steps"].sweep(detector, modules["options"].default_solvers(), [1], stop)
    assert detector.neck.settings == before and next(detector.neck.parameters()).dtype == torch.float32


def test_ticks_are_as_many_as_announced(modules, detector):
    steps, ticks = modules["detector_steps"], []
    solvers = [*modules["options"].default_solvers()[:2], modules["options"].UNROLLED]
    for counts in ([0, 1, 2], [2]):
        ticks.clear()
        steps.sweep(detector, solvers, counts, lambda: ticks.append(1))
        assert len(ticks) == detector.num_batches * steps.num_cases(solvers, counts)


def test_the_pyramid_at_rest_is_a_fixed_point_in_double_precision(modules, detector):
    neck, calls = detector.neck, []
    images = [image for batch, _ in detector.loader for image in batch]
    with modules["detector_steps"].at_rest(neck), torch.no_grad():
        handle = neck.module.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
        outputs = detector.model(images)
        handle.remove()
        basis, pyramid = calls[-1][1], neck.last_solution.value
        again = neck.module(pyramid, basis)
    assert all(level.dtype == torch.float64 for level in pyramid)
    assert all((a - b).norm() <= 1e-8 * b.norm() for a, b in zip(again, pyramid, strict=True))
    assert outputs[0]["boxes"].dtype == torch.float32  # what comes after the neck runs as it always does


def test_the_spectral_radius_is_how_errors_shrink(modules, detector):
    steps = modules["detector_steps"]
    rows = steps.sweep(detector, modules["options"].default_solvers()[:1], [6, 8], lambda: None)
    errors = [row.error_worst for row in rows[2:]]
    radii = steps.spectral_radii(detector)
    assert len(radii) == 2 and 0 < radii.min()
    assert (errors[1] / errors[0]) ** 0.5 == pytest.approx(radii.max().item(), rel=0.15)


def test_a_detector_may_use_a_solver_object_of_any_kind(modules, tmp_path):
    options, steps = modules["options"], modules["detector_steps"]
    detector = steps.load(save_detector(tmp_path, neck_settings={"solver": "auto", "max_steps": 4}), None, 1, "cpu")
    solver = options.named(detector.neck.solver)
    assert solver.label == "auto" and solver.solver == deqkit.Auto()
    assert [row.solver for row in steps.sweep(detector, [solver], [2], lambda: None)] == [
        "at rest", "own settings", "auto",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="nonsense"):
        options.named("nonsense")


def test_the_necks_own_solver_takes_the_place_of_the_default_of_its_kind(modules):
    default = modules["solver_iters"].default_solvers_of
    assert [s.label for s in default(deqkit.Anderson(history=3))] == ["fixed_point", "anderson:history=3", "broyden"]
    assert [s.label for s in default("newton_krylov")] == ["fixed_point", "anderson", "broyden", "newton_krylov"]


@pytest.mark.parametrize(
    ("config", "message"),
    [({"neck": "fpn", "neck_settings": {}}, "neck 'fpn': nothing to solve"), ({"num_classes": 4}, "trained for 3")],
)
def test_unusable_detectors_are_refused(modules, tmp_path, capsys, config, message):
    checkpoint = save_detector(tmp_path, **config)
    arguments = ["--only", "detector", "--detector", str(checkpoint), "--out", str(tmp_path / "out")]
    assert modules["solver_iters"].main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and str(checkpoint) in error and message in error
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# the answer


@pytest.fixture
def rows(modules):
    row = modules["detector_steps"].DetectorRow

    def make(rest, **aps):
        found = [row("at rest", None, 1, rest, rest, 9.0, 1e-10, 1e-10, None, None, None)]
        return found + [row("s", int(k[1:]), 1, ap, ap, 1.0, 0.1, 0.1, 0.2, 0.3, 1.0) for k, ap in aps.items()]

    return make


def test_the_answer_is_the_step_count_from_which_on_ap_stays(modules, rows):
    answer = modules["detector_report"].answer
    assert "s: 5 steps are enough" in answer(rows(0.305, k1=0.1, k2=0.303, k5=0.3041, k7=0.3042, k9=0.305), "s")
    # Within the limit by chance at 2 steps, not at 3: 2 are not enough.
    assert "s: 5 steps are enough" in answer(rows(0.305, k1=0.1, k2=0.305, k3=0.29, k5=0.305, k9=0.305), "s")
    # Better than at rest is not the same as at rest.
    assert "s: 7 steps are enough" in answer(rows(0.3, k1=0.31, k5=0.302, k7=0.3009, k9=0.3), "s")
    assert "s: 1 step is enough" in answer(rows(0.3, k1=0.3, k2=0.3), "s")
    assert "with the pyramid 20.0% off" in answer(rows(0.3, k1=0.3, k2=0.3), "s")
    # Nothing shows that AP stays from the last number of steps on.
    assert "s: 9 steps, the most that were tried, are the first" in answer(rows(0.3, k1=0.1, k9=0.3), "s")
    assert "s: 20 steps are not enough: AP is 40.00 then" in answer(rows(0.5, k1=0.1, k10=0.3, k20=0.4), "s")
    assert "AP is 0 with the pyramid at rest" in answer(rows(0.0, k1=0.0, k9=0.0), "s")
    assert "no objects" in answer(rows(None, k1=None, k9=None), "s")


def test_the_paper_is_compared_where_its_steps_were_measured(modules, rows):
    beside = modules["detector_report"].beside_the_paper
    assert beside(rows(0.3, k7=0.29, k15=0.3)).endswith("s 29.00 and 30.00")
    assert beside(rows(0.3, k7=0.3)) is None and beside(rows(None, k7=None, k15=None)) is None


def test_a_reference_that_is_not_at_rest_is_said_to_be_none(modules, rows):
    from dataclasses import replace

    not_at_rest, found = modules["detector_report"].not_at_rest, rows(0.3, k1=0.3)
    assert not_at_rest(found) is None
    for residual in (1e-3, float("nan")):
        assert "could not be found" in not_at_rest([replace(found[0], residual_worst=residual), *found[1:]])


# ---------------------------------------------------------------------------------------------------------------------
# the small detector


@pytest.fixture
def small(modules, monkeypatch, tmp_path):
    """The small detector of a cache, and the seeds of the trainings so far; they are real up to the optimiser steps."""
    module, trained = modules["small_detector"], []
    monkeypatch.setattr(module, "QUICK", module.QUICK | {"steps": 1, "train_images": 1, "val_images": 1})
    monkeypatch.setattr(sys, "argv", ["solver_iters.py"])

    def fit(args, detector, neck, seed, data, prepare):
        trained.append(seed)
        return modules["compare_necks"].fit(args, detector, neck, seed, data, prepare)

    monkeypatch.setattr(module, "fit", fit)
    return lambda **changed: module.small_detector(
        tmp_path / "cache", "cpu", **{"seed": 0, "quick": True} | changed
    ), trained


def test_the_small_detector_is_trained_once(small, capsys):
    make, trained = small
    path = make()
    before = path.read_bytes()
    assert make() == path and path.read_bytes() == before and trained == [0]
    assert make(retrain=True) == path and trained == [0, 0]
    path.write_bytes(before[: len(before) // 2])
    assert make() == path and trained == [0, 0, 0] and len(path.read_bytes()) == len(before)
    assert f"{path} is not a checkpoint" in capsys.readouterr().err


def test_other_settings_are_another_detector(modules, small):
    from adapters.detection.training import load_checkpoint

    make, trained = small
    paths = [make(), make(seed=1), make(mixing=4.0)]
    assert len(set(paths)) == 3 and trained == [0, 1, 0]
    weights = [
        load_checkpoint(path).neck.transform.cross_scale.same[0].weight.detach() for path in (paths[0], paths[2])
    ]
    assert float(weights[1].std() / weights[0].std()) == pytest.approx(2, rel=0.1)
    # A file that came to lie in the place of another is not taken for it.
    paths[1].write_bytes(paths[0].read_bytes())
    assert make(seed=1) == paths[1] and trained[-1] == 1


def test_a_training_that_is_stopped_leaves_no_detector(modules, small, monkeypatch, tmp_path, capsys):
    from adapters.detection.training import DetectionModule

    make, trained = small

    def interrupted(self, batch, batch_idx):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DetectionModule, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make()
        arguments = ["--only=detector", "--quick", f"--cache={tmp_path / 'cache'}", f"--out={tmp_path / 'out'}"]
        assert modules["solver_iters"].main(arguments) == 130
    assert "stopped" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.ckpt*"))
    assert make().exists() and trained == [0, 0, 0]


def test_images_that_are_in_the_way_are_named(modules, small, tmp_path, capsys):
    make, _ = small
    path = make()
    path.unlink()
    (path.parent / "data" / "synthetic.json").unlink()
    arguments = ["--only=detector", "--quick", f"--cache={tmp_path / 'cache'}", f"--out={tmp_path / 'out'}"]
    assert modules["solver_iters"].main(arguments) == 2
    assert str(path.parent / "data") in capsys.readouterr().err.splitlines()[-1]
