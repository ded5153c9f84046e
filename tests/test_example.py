"""examples/retinanet_ifpn.py from end to end, and what it says about bad options and bad data."""

import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from adapters.detection.data import SyntheticSettings, generate_dataset

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "retinanet_ifpn.py"
TINY = (  # a run of seconds
    "--epochs 2 --batch-size 4 --image-size 64 --neck-channels 16 --train-images 8 --val-images 4 --device cpu".split()
)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("retinanet_ifpn_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _as_it_was():
    """The example quietens Lightning; Lightning switches Ctrl-C off when it ends on one."""
    logger = logging.getLogger("lightning.pytorch")
    level, handler, threads = logger.level, signal.getsignal(signal.SIGINT), torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)
    logger.setLevel(level)


@pytest.fixture
def dataset(tmp_path):
    settings = SyntheticSettings(train_images=4, val_images=2, image_size=64, seed=2)
    return generate_dataset(tmp_path / "given", settings, progress=False)


def refused(example, capsys, arguments, *words, code=2):
    assert example.main([str(argument) for argument in arguments]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    for word in words:
        assert str(word) in error
    return error


def test_end_to_end(example, tmp_path, capsys):
    out = tmp_path / "runs" / "tiny"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--out", str(out), *TINY]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr and ".py:" not in run.stderr, run.stderr  # no warning either
    header = next(line for line in run.stdout.splitlines() if line.split()[:1] == ["neck"])
    for name in ("neck", "APs", "APm", "APl", "parameters", "s/step", "solver steps", "residual", "converged"):
        assert name in header
    rows = [line.split() for line in run.stdout.splitlines() if re.match(r"\s*(i-FPN|FPN)\s+(\d|n/a)", line)]
    assert [row[0] for row in rows] == ["i-FPN", "FPN"]
    assert all(row[6] == "n/a" for row in rows)  # no object of 96 x 96 pixels in an image of 64 x 64

    for picture in ("detections.png", "feature_maps.png", "residual_trace.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())["rows"]
    assert [row["neck"] for row in summary] == ["ifpn", "fpn"]
    checkpoint = torch.load(out / "ifpn" / "checkpoints" / "last.ckpt", weights_only=True)
    assert Path(checkpoint["detection"]["data"]["root"]).is_absolute()  # the benchmark starts anywhere
    assert 1 <= summary[0]["mean_steps"] <= 20 and "mean_steps" not in summary[1]
    for neck in ("ifpn", "fpn"):
        for name in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "csv/metrics.csv", "detections.json"):
            assert (out / neck / name).is_file()
        assert list((out / neck / "tensorboard").glob("events.*"))
        assert torch.load(out / neck / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1
    assert not list(out.rglob("*.partial"))

    refused(example, capsys, ["--out", out, *TINY], "--resume", "--overwrite", out)
    refused(example, capsys, ["--out", out, *TINY, "--resume", "--lr", "0.5"], "--lr", "0.001")
    assert example.main(["--out", str(out), *TINY, "--resume"]) == 0
    again = capsys.readouterr().out
    assert again.count("already trained") == 2 and header in again
    refused(example, capsys, ["--out", out, *TINY, "--resume", "--max-steps", "5"], "without --max-steps")

    # A resumed run for one neck keeps what is known of the other.
    assert example.main(["--out", str(out), *TINY, "--resume", "--neck", "fpn"]) == 0
    assert json.loads((out / "summary.json").read_text())["rows"] == summary

    # Stopped between the last checkpoint and the table: no step is left to time, and the table is valid json.
    (out / "ifpn" / "metrics.json").unlink()
    assert example.main(["--out", str(out), *TINY, "--resume"]) == 0
    assert "NaN" not in (out / "summary.json").read_text()
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert rows[0] == summary[0] | {"seconds_per_step": None} and rows[1] == summary[1]

    last = out / "ifpn" / "checkpoints" / "last.ckpt"
    (out / "ifpn" / "metrics.json").unlink()
    last.write_bytes(last.read_bytes()[:1000])
    refused(example, capsys, ["--out", out, *TINY, "--resume"], last, "not a checkpoint")
    (out / "settings.json").write_text("{")
    refused(example, capsys, ["--out", out, *TINY, "--resume"], "settings.json")


def test_interrupted_and_resumed(example, tmp_path, capsys, monkeypatch):
    """The resumed run ends as one that was never interrupted."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*TINY, "--neck", "ifpn"]
    assert example.main(["--out", str(whole), *options]) == 0

    step = example.DetectionModule.training_step

    def interrupted_in_the_second_epoch(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 1:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(example.DetectionModule, "training_step", interrupted_in_the_second_epoch)
    assert example.main(["--out", str(parts), *options]) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (parts / "summary.json").exists()
    monkeypatch.undo()
    assert example.main(["--out", str(parts), *options, "--resume"]) == 0

    logs = sorted(path.relative_to(parts) for path in parts.rglob("metrics.csv"))
    assert len(logs) == 2  # those of the first epoch were not written over

    states = [torch.load(out / "ifpn/checkpoints/last.ckpt", weights_only=True)["state_dict"] for out in (whole, parts)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    rows = [json.loads((out / "summary.json").read_text())["rows"][0] for out in (whole, parts)]
    assert rows[0]["AP"] == rows[1]["AP"] and rows[0]["mean_steps"] == rows[1]["mean_steps"]


def test_moved_run_keeps_its_best_checkpoint(example, tmp_path, monkeypatch):
    """Lightning forgets the best score when the folder has another name, and would write over the best checkpoint."""
    evaluation = sys.modules["adapters.detection.evaluation"]
    evaluate, step, figures = evaluation.evaluate_coco, example.DetectionModule.training_step, iter([0.9, 0.1])
    monkeypatch.setattr(evaluation, "evaluate_coco", lambda *args: evaluate(*args) | {"AP": next(figures)})

    def interrupted(self, batch, batch_idx):
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    options = [*TINY, "--neck", "ifpn"]
    with monkeypatch.context() as patch:
        patch.setattr(example.DetectionModule, "training_step", interrupted)
        assert example.main(["--out", str(tmp_path / "before"), *options]) == 130
    (tmp_path / "before").rename(tmp_path / "after")
    assert example.main(["--out", str(tmp_path / "after"), *options, "--resume"]) == 0
    epochs = {
        name: torch.load(tmp_path / "after/ifpn/checkpoints" / f"{name}.ckpt", weights_only=True)["epoch"]
        for name in ("best", "last")
    }
    assert epochs == {"best": 0, "last": 1}


def test_validations_are_about_four_and_one_is_last(example):
    for epochs in range(1, 120):
        interval = example.validation_interval(epochs)
        assert epochs % interval == 0 and epochs // interval <= 16
    assert [epochs // example.validation_interval(epochs) for epochs in (2, 5, 10, 20)] == [2, 5, 5, 4]


def test_shares_are_not_rounded_to_all_or_nothing(example):
    shares = [0.0, 1 / 3000, 0.5, 499 / 500, 4999 / 5000, 1.0]
    assert [example.format_share(share) for share in shares] == ["0%", "<0.1%", "50.0%", "99.8%", ">99.9%", "100%"]


def test_given_data_with_one_split(example, dataset, tmp_path, capsys):
    (dataset / "annotations" / "instances_train2017.json").unlink()
    options = "--epochs 1 --batch-size 2 --image-size 64 --neck-channels 16 --neck fpn --device cpu".split()
    assert example.main(["--data", str(dataset), "--out", str(tmp_path / "out"), *options]) == 0
    assert "only the split val2017 is there" in capsys.readouterr().out
    assert not (tmp_path / "out" / "residual_trace.png").exists()


def remove_annotations(root):
    for path in (root / "annotations").iterdir():
        path.unlink()
    return "annotations"


def break_json(root):
    path = root / "annotations" / "instances_train2017.json"
    path.write_text('{"images": [')
    return path


def drop_key(root):
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "images"}))
    return path


def truncate_image(root):
    path = root / "val2017" / "000000000001.jpg"
    path.write_bytes(path.read_bytes()[:400])
    return path


def remove_image(root):
    path = root / "train2017" / "000000000002.jpg"
    path.unlink()
    return path


def thin_image(root):
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["images"][0].update(width=900, height=1)
    for entry in content["annotations"]:
        entry.update(bbox=[1, 0, 2, 1])
    path.write_text(json.dumps(content))
    image = root / "train2017" / content["images"][0]["file_name"]
    Image.new("RGB", (900, 1)).save(image)
    return image


def empty_validation(root):
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    return path


@pytest.mark.parametrize(
    "damage", [remove_annotations, break_json, drop_key, truncate_image, remove_image, empty_validation, thin_image]
)
def test_bad_data(example, dataset, tmp_path, capsys, damage):
    refused(example, capsys, ["--data", dataset, "--out", tmp_path / "out"], damage(dataset))
    assert not (tmp_path / "out").exists()


def test_bad_data_leaves_the_run_to_be_overwritten(example, dataset, tmp_path, capsys):
    run = tmp_path / "out"
    (run / "fpn").mkdir(parents=True)
    (run / "fpn" / "metrics.json").write_text("{}")
    truncate_image(dataset)
    refused(example, capsys, ["--data", dataset, "--out", run, "--overwrite"], "000000000001.jpg")
    assert (run / "fpn" / "metrics.json").exists()


def test_folder_that_is_not_there(example, tmp_path, capsys):
    refused(example, capsys, ["--data", tmp_path / "nowhere", "--out", tmp_path / "out"], tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_out_is_never_taken_from_its_owner(example, dataset, tmp_path, capsys):
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / "data" / "thesis.txt").write_text("years of work")
    for existing in ([], ["--overwrite"], ["--resume"]):
        refused(example, capsys, ["--out", project, *TINY, *existing], "holds other files", project)
    vscode = tmp_path / "vscode"
    vscode.mkdir()
    (vscode / "settings.json").write_text('{"editor.fontSize": 12}')
    code = tmp_path / "code"
    (code / "fpn").mkdir(parents=True)
    (code / "fpn" / "model.py").write_text("work")
    for folder, name in ((vscode, "settings.json"), (code, "fpn/model.py")):
        refused(example, capsys, ["--out", folder, *TINY, "--overwrite"], f"holds other files ({name})")
    assert (vscode / "settings.json").exists() and (code / "fpn" / "model.py").exists()
    refused(example, capsys, ["--data", dataset, "--out", dataset.parent, "--overwrite"], "contains --data")
    refused(example, capsys, ["--out", project / "data" / "thesis.txt", *TINY], "is a file")
    refused(example, capsys, ["--out", tmp_path / "new", *TINY, "--resume"], "no run")
    assert (project / "data" / "thesis.txt").read_text() == "years of work"
    assert (dataset / "synthetic.json").exists()


@pytest.mark.parametrize(
    "options",
    [["--weights-backbone", "IMAGENET9"], ["--weights-backbone", str(SCRIPT)], ["--image-size", "20"]],
)
def test_unusable_model_options(example, tmp_path, capsys, options):
    refused(example, capsys, ["--out", tmp_path / "out", *TINY, *options], options[1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--epochs", "0"],
        ["--batch-size", "-1"],
        ["--lr", "0"],
        ["--lr", "nan"],
        ["--lr", "inf"],
        ["--solver", "newton"],
        ["--seed", "-1"],
        ["--seed", "4294967296"],
        ["--resume", "--overwrite"],
    ],
)
def test_options_are_checked(example, tmp_path, capsys, options):
    with pytest.raises(SystemExit) as caught:
        example.main(["--out", str(tmp_path / "out"), *options])
    assert caught.value.code == 2 and options[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
