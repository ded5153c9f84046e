"""`python -m adapters.detection fit|validate|test`: runs, resumes exactly, refuses clearly, works on two processes."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import write_checkpoint
from lightning.pytorch.callbacks import Timer

from adapters.detection.data import SyntheticSettings, generate_dataset
from adapters.detection.training import DetectionModule, Schedule, load_checkpoint
from adapters.detection.training.cli import PACKAGE, run

IMAGES = 10
SMALL = [
    "--model.weights_backbone=null", "--model.detector.frozen_norm=false", "--model.detector.backbone=resnet18",
    "--model.detector.image_size=64", "--model.detector.max_size=64", "--model.detector.neck_channels=16",
    "--data.batch_size=2", "--data.num_workers=0", "--data.verify=false", "--data.progress=false",
    "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1", "--model.schedule.warmup_steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "data"
    settings = SyntheticSettings(train_images=IMAGES, val_images=3, image_size=64, seed=3)
    return generate_dataset(folder, settings, progress=False)


def command(root, out, *more, steps=7, every=2, method="fit"):
    fit = [f"--trainer.max_steps={steps}", f"--checkpoint_every={every}", "--trainer.val_check_interval=4"]
    words = [method, f"--data.root={root}", f"--out={out}", *SMALL, *fit, *more]
    return [word for word in words if method == "fit" or "schedule" not in word]


def process(words, program=("-m", "adapters.detection")):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent.parent)}
    return subprocess.Popen(
        [sys.executable, *program, *words], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def losses(out):
    """The loss of every step, over all parts of a run; a step that was done twice must be the same twice."""
    found = {}
    for path in sorted(Path(out).rglob("metrics.csv")):
        for row in csv.DictReader(path.open()):
            if row["train/loss"]:
                step = int(row["step"])
                assert found.setdefault(step, row["train/loss"]) == row["train/loss"], step
    return found


def weights(out):
    return load_checkpoint(Path(out) / "checkpoints" / "last.ckpt").state_dict()


def test_fit_validate_test(root, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(command(root, out, steps=4)) == 0
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert "10 images" in capsys.readouterr().out
    checkpoint = out / "checkpoints" / "last.ckpt"
    remembered = torch.load(checkpoint, weights_only=True)["detection"]
    assert remembered["schedule"]["total_steps"] == 4 and remembered["detector"]["num_classes"] == 5
    for method in ("validate", "test"):
        words = [method, f"--config={out / 'config.yaml'}", f"--ckpt_path={checkpoint}"]
        config = (out / "config.yaml").read_text()
        kept = [line for line in config.splitlines() if not line.startswith(("checkpoint_path", "ckpt_path"))]
        (out / "config.yaml").write_text("\n".join(kept))
        assert run(words) == 0
    assert isinstance(json.loads((out / "val_detections.json").read_text()), list)


def test_resume_in_the_middle_of_an_epoch_after_kill(root, tmp_path):
    """5 batches an epoch; killed soon after the checkpoint of step 3; what follows is compared bit for bit."""
    varied = ["--model.detector.image_size=[48, 64]", "--data.group_by_aspect=true"]
    assert run(command(root, tmp_path / "whole", *varied, every=3)) == 0
    out = tmp_path / "killed"
    running = process(command(root, out, *varied, every=3))
    checkpoint, deadline = out / "checkpoints" / "last.ckpt", time.monotonic() + 240
    while not checkpoint.exists() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    output = running.communicate()[0]
    assert checkpoint.exists(), output
    before = torch.load(checkpoint, weights_only=True)["global_step"]
    assert before == 3
    assert run(command(root, out, *varied, "--ckpt_path=last", every=3)) == 0
    whole, resumed = losses(tmp_path / "whole"), losses(out)
    assert len(whole) == 7 and {step: whole[step] for step in range(3, 7)}.items() <= resumed.items() <= whole.items()
    expected, found = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 7


def test_best_and_last_are_those_of_the_run(root, tmp_path, capsys):
    """Neither needs a checkpoint callback, nor the backbone's weights that the training started from."""
    out = tmp_path / "run"
    assert run(command(root, out, "--trainer.val_check_interval=1", steps=2)) == 0
    again = [
        f"--config={out / 'config.yaml'}",
        "--model.weights_backbone=gone.pth",
        "--trainer.enable_checkpointing=false",
    ]
    for name in ("best", "last"):
        capsys.readouterr()
        assert run(["validate", *again, f"--ckpt_path={name}"]) == 0
        assert "No checkpoint will be loaded" not in capsys.readouterr().err
    assert run(["validate", *again]) == 2
    assert "--ckpt_path best, last, or a file" in capsys.readouterr().err
    # Resumed, the run keeps a config that fits all of it.
    assert run(command(root, out, "--ckpt_path=best", steps=3)) == 0
    assert yaml.safe_load((out / "config.yaml").read_text())["ckpt_path"] is None


def test_a_run_that_ends_by_epochs_has_its_last_step(root, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(command(root, whole, every=100)) == 0
    assert run(command(root, out, "--trainer.max_epochs=1", every=100)) == 0
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == IMAGES // 2
    assert run(command(root, out, "--ckpt_path=last", every=100)) == 0
    assert losses(out) == losses(whole)


def test_a_resumed_run_trains_by_the_schedule_of_today(root, tmp_path):
    """Longer, at another rate: its first step too, which the checkpoint would have at a rate of zero."""
    out, cosine = tmp_path / "out", ["--model.schedule.decay=cosine", "--model.schedule.milestones=[]"]
    assert run(command(root, out, *cosine, steps=3)) == 0
    assert run(command(root, out, *cosine, "--ckpt_path=last", "--model.schedule.lr=0.002", steps=6)) == 0
    today = Schedule(6, lr=0.002, warmup_steps=2, warmup_factor=0.001)
    rows = list(csv.DictReader((out / "csv" / "resumed_1" / "metrics.csv").open()))
    found = {int(row["step"]): float(row[name]) for row in rows for name in row if name.startswith("lr") and row[name]}
    assert found == pytest.approx({step: 0.002 * today.factor(step) for step in (3, 4, 5)})


def test_a_finished_run_can_be_made_longer(root, tmp_path):
    assert run(command(root, tmp_path / "whole", every=100)) == 0
    assert run(command(root, tmp_path / "longer", steps=3, every=100)) == 0
    assert run(command(root, tmp_path / "longer", "--ckpt_path=last", every=100)) == 0
    assert losses(tmp_path / "longer") == losses(tmp_path / "whole")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "longer")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


POISONED = """
import json
import sys
from pathlib import Path
import torch
from adapters.detection.training import DetectionModule
from adapters.detection.training.cli import run

step = DetectionModule.training_step

def poisoned(self, batch, batch_idx):
    # An infinite loss with finite gradients, on one rank alone.
    bad = self.global_rank == 1 and self.global_step == 1
    add = torch.inf if bad else 0.0
    hook = self.model.register_forward_hook(lambda m, args, out: {k: v + add for k, v in out.items()})
    try:
        return step(self, batch, batch_idx)
    finally:
        hook.remove()

def report(self):
    total = sum(p.double().sum().item() for p in self.parameters())
    (figures,) = [callback.validation for callback in self.trainer.callbacks if hasattr(callback, "validation")]
    found = [self.skipped_steps, total, figures.mean_steps, figures.worst_residual]
    Path(__file__).with_name(f"rank{self.global_rank}.json").write_text(json.dumps(found))

DetectionModule.training_step, DetectionModule.on_train_end = poisoned, report
sys.exit(run(sys.argv[1:]))
"""


def test_two_processes(root, tmp_path):
    """Every image is evaluated once, the ranks end with the same weights, and a bad step of one is skipped by both."""
    out, script = tmp_path / "two", tmp_path / "poisoned.py"
    script.write_text(POISONED)
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.val_check_interval=2"]
    two += ["--model.detector.options.score_thresh=0.0", "--model.detector.options.detections_per_img=5"]
    running = process(command(root, out, *two, steps=3), [str(script)])
    output = running.communicate(timeout=300)[0]
    assert running.returncode == 0, output
    found = json.loads((out / "detections.json").read_text())
    counts = {image: sum(entry["image_id"] == image for entry in found) for image in (1, 2, 3)}
    assert counts == {1: 5, 2: 5, 3: 5}, output
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first[0] == 1 and first == second, output
    assert len(losses(out)) == 3


def test_ema_is_what_is_evaluated(root, tmp_path):
    out = tmp_path / "ema"
    assert run(command(root, out, "--ema=0.5", "--trainer.accumulate_grad_batches=2", steps=2)) == 0
    content = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    averaged, current = content["state_dict"], content["current_model_state"]
    name = next(name for name in averaged if name.endswith("cls_logits.bias"))
    assert not torch.equal(averaged[name], current[name])
    assert torch.equal(load_checkpoint(out / "checkpoints" / "last.ckpt").state_dict()[name], averaged[name])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.max_steps=-1"], "give trainer.max_steps"),
        (["--checkpoint_every=0"], "checkpoint_every must be at least 1"),
        (["--ema=1.5"], "ema must be between 0 and 1"),
        (["--data.val_split=elsewhere"], "instances_elsewhere.json"),
        (["--backend=fast"], "unknown backend 'fast'"),
        (["--model.detector.neck=bifpn"], "unknown neck 'bifpn'"),
        (["--model.detector.neck_settings.solver=newton"], "newton"),
        (["--model.schedule.milestones=[5, 3]"], "milestones must rise"),
        (["--model.detector.options.score=1"], "no argument 'score'"),
        (["--model.detector.depth=3"], "depth"),
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
        (["--ckpt_path=best"], "best.ckpt"),
        (["--model.detector.frozen_norm=true"], "must not be frozen"),
        (["--trainer.precision=bf16-true"], "take mixed"),
    ],
)
def test_unusable_settings_end_in_one_line_and_leave_nothing(root, tmp_path, capsys, words, message):
    out = tmp_path / "out"
    try:
        status = run([*command(root, out), *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize("method", ["fit", "validate"])
def test_unusable_checkpoints_are_named_before_anything_starts(root, tmp_path, capsys, method):
    whole = write_checkpoint(tmp_path / "fpn.ckpt", "fpn", num_classes=5)
    (tmp_path / "cut.ckpt").write_bytes(whole.read_bytes()[:9000])
    for name, message in (("cut", "damaged or cut off (9000 bytes)"), ("fpn", "resnet18 and ifpn: it lacks model.ba")):
        words = command(root, tmp_path / "out", f"--ckpt_path={tmp_path / name}.ckpt", method=method)
        assert run(words) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{name}.ckpt" in error and message in error
    assert not (tmp_path / "out").exists()


def test_a_run_that_ends_by_the_clock_has_its_last_step(root, tmp_path, monkeypatch):
    """Inside an epoch, between two checkpoints; what is resumed from there is what was never stopped."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(command(root, whole, every=100)) == 0
    step = DetectionModule.training_step
    done = []

    def counted(self, batch, batch_idx):
        done.append(batch_idx)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DetectionModule, "training_step", counted)
        patch.setattr(Timer, "time_elapsed", lambda self, stage="train": 1e6 if len(done) == 3 else 0.0)
        assert run(command(root, out, "--trainer.max_time=00:01:00:00", every=100)) == 0
    assert len(done) == 3
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert run(command(root, out, "--ckpt_path=last", every=100)) == 0
    assert losses(out) == losses(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_run_keeps_the_step_and_is_resumed(root, tmp_path, workers, monkeypatch, capsys):
    """Ctrl-C goes to every process of a terminal, to those that load images as well."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(command(root, whole, every=100)) == 0
    step, done = DetectionModule.training_step, []

    def interrupted(self, batch, batch_idx):
        done.append(batch_idx)
        if len(done) == 3:
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(DetectionModule, "training_step", interrupted)
        run(command(root, out, f"--data.num_workers={workers}", every=100))
    assert len(done) == 3 and capsys.readouterr().err.count("stopping after this step") == 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert run(command(root, out, "--ckpt_path=last", every=100)) == 0
    assert losses(out) == losses(whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_batch_size_inside_an_epoch_is_told(root, tmp_path):
    out = tmp_path / "out"
    assert run(command(root, out, "--trainer.limit_val_batches=0", steps=3)) == 0
    with pytest.warns(UserWarning, match="in batches of 2 images over all processes; in batches of 3 the rest"):
        assert run(command(root, out, "--ckpt_path=last", "--data.batch_size=3", steps=4)) == 0


def test_what_the_data_say_before_training(root, tmp_path, capsys):
    """One split for both is said; an image that is too thin for the size asked for is refused by name."""
    shutil.copytree(root, tmp_path / "data")
    path = tmp_path / "data" / "annotations" / "instances_train2017.json"
    path.with_name("instances_val2017.json").unlink()
    assert run(command(tmp_path / "data", tmp_path / "out", "--trainer.limit_val_batches=0", steps=1)) == 0
    assert "only the split train2017 is there" in capsys.readouterr().out
    content = json.loads(path.read_text())
    content["images"][2].update(width=800, height=2)
    path.write_text(json.dumps(content))
    assert run(command(tmp_path / "data", tmp_path / "thin", steps=1)) == 2
    assert f"{content['images'][2]['file_name']} of 800x2 is too thin" in capsys.readouterr().err
    assert not (tmp_path / "thin").exists()
    words = ("--data.bad_data=skip", "--data.verify=false", "--trainer.limit_val_batches=0")
    with pytest.warns(UserWarning, match="train2017: 1 images are left out; the first: .* of 800x2 is too thin"):
        assert run(command(tmp_path / "data", tmp_path / "thin", *words, steps=1)) == 0
    told = capsys.readouterr().out
    images = len(content["images"]) - 1
    assert f"train: {images} images" in told and f"val: {images} images" in told and "left out: 1 images" in told


def test_logs_and_checkpoints_can_be_left_out(root, tmp_path):
    out = tmp_path / "out"
    assert run(command(root, out, "--trainer.logger=false", "--trainer.enable_checkpointing=false", steps=1)) == 0
    assert [path.name for path in out.iterdir()] == ["config.yaml"]


def test_a_run_is_not_written_over(root, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text("old")
    assert run(command(root, out)) == 2
    assert "before its first checkpoint" in capsys.readouterr().err  # there is nothing to continue
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "last.ckpt").touch()
    assert run(command(root, out)) == 2
    assert "--ckpt_path last continues it" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"config.yaml", "checkpoints"} and (
        out / "config.yaml"
    ).read_text() == "old"
