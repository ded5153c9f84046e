"""Training with Lightning: the loss falls, a seed fixes everything, a run can be resumed, bad steps are skipped."""

import csv
import logging
import math
import pickle
import warnings

import lightning as L
import pytest
import torch
from checkpoints import write_checkpoint
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import deqkit
from adapters.detection import build_detector
from adapters.detection.data import CocoDataModule, SyntheticSettings, generate_dataset
from adapters.detection.evaluation import CocoEvaluation
from adapters.detection.training import (
    DetectionModule,
    DetectorConfig,
    Schedule,
    SolverFigures,
    Solves,
    StepTimer,
    load_checkpoint,
    median_of,
    summarize,
)
from adapters.detection.visualize import draw_detections, draw_feature_maps, draw_residual_trace
from adapters.detection.weight_decay import exempt_from_decay

SIZE, BATCH, IMAGES = 64, 4, 8


@pytest.fixture(scope="module", autouse=True)
def _one_quiet_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "data"
    settings = SyntheticSettings(train_images=IMAGES, val_images=4, image_size=SIZE, seed=3)
    return generate_dataset(folder, settings, progress=False)


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def make_module(root, neck="ifpn", epochs=1, seed=0, lr=2e-3, **neck_settings):
    L.seed_everything(seed, verbose=False)
    config = DetectorConfig(7, neck, neck_channels=16, neck_settings=neck_settings, image_size=SIZE, anchor_size=16.0)
    schedule = Schedule(epochs * IMAGES // BATCH, lr=lr, warmup_steps=2, seed=seed)
    return DetectionModule(config, schedule, data={"root": str(root)})


def fit(module, root, folder, epochs, *callbacks, seed=0, resume=None, validate=False, logger=False):
    data = CocoDataModule(root, batch_size=BATCH, seed=seed, verify=False, progress=False)
    data.setup()
    losses = Losses()
    if validate:
        evaluation = CocoEvaluation(data.val_dataset.ground_truth(), data.val_dataset.category_of_label)
        callbacks = (*callbacks, evaluation)
    checkpoint = ModelCheckpoint(
        folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False, save_top_k=1
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, gradient_clip_val=10.0, num_sanity_val_steps=0,
        limit_val_batches=1.0 if validate else 0, reload_dataloaders_every_n_epochs=1, log_every_n_steps=1,
        enable_model_summary=False, enable_progress_bar=False, logger=logger,
        callbacks=[losses, checkpoint, *callbacks],
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer, losses.values


def state_of(module):
    return {name: value.clone() for name, value in module.model.state_dict().items()}


def differing(first, second):
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


@pytest.mark.parametrize("neck", ["ifpn", "fpn"])
def test_loss_falls(root, tmp_path, neck):
    module = make_module(root, neck, epochs=12)
    _, losses = fit(module, root, tmp_path, 12)
    assert len(losses) == 24
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])
    assert module.skipped_steps == 0


def test_seed_fixes_the_run(root, tmp_path):
    runs = [
        fit(make_module(root, seed=seed), root, tmp_path / str(i), 1, seed=seed)[1] for i, seed in enumerate((1, 1, 2))
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("neck", ["ifpn", "fpn"])
def test_resumed_run_equals_an_uninterrupted_one(root, tmp_path, neck):
    whole = make_module(root, neck, epochs=2)
    _, expected = fit(whole, root, tmp_path / "whole", 2, validate=True)
    _, first = fit(make_module(root, neck, epochs=2), root, tmp_path / "parts", 1, validate=True)
    resumed = make_module(root, neck, epochs=2, seed=9)  # weights and state come from the checkpoint
    resumed.schedule = whole.schedule
    trainer, second = fit(resumed, root, tmp_path / "parts", 2, resume=tmp_path / "parts" / "last.ckpt", validate=True)
    assert trainer.current_epoch == 2 and trainer.global_step == 4
    assert first + second == expected
    assert differing(state_of(whole), state_of(resumed)) == []


class Poison(L.Callback):
    """Makes the features, the loss, or only the gradient, of one step not finite."""

    def __init__(self, step, where):
        self.step, self.where, self.before, self.after = step, where, None, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx != self.step - 1:
            return
        self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}
        bias = pl_module.model.head.classification_head.cls_logits.bias
        if self.where == "loss":
            hook = pl_module.model.head.register_forward_hook(
                lambda module, args, output: {key: value * float("nan") for key, value in output.items()}
            )
        elif self.where == "features":
            hook = pl_module.model.backbone.body.conv1.register_forward_hook(lambda m, args, output: output * torch.inf)
        else:
            hook = bias.register_hook(lambda gradient: gradient * float("inf"))
        self.hook = hook

    def on_train_batch_end(self, trainer, pl_module, *args):
        if self.before is not None and self.after is None:
            self.after = {name: value.clone() for name, value in pl_module.state_dict().items()}
            self.hook.remove()


@pytest.mark.parametrize("where", ["features", "loss", "gradient"])
def test_step_that_is_not_finite_changes_nothing_and_is_counted(root, tmp_path, where):
    module, poison = make_module(root, "fpn", epochs=2), Poison(1, where)
    _, losses = fit(module, root, tmp_path, 2, poison)
    assert poison.after is not None and differing(poison.before, poison.after) == []
    assert module.skipped_steps == 1
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert len(finite) >= 3 and torch.isfinite(torch.tensor(finite)).all()


def test_evaluation_counts_the_images_shown(root):
    """With limit_val_batches the objects of the other images are not missed, they were not looked for."""
    data = CocoDataModule(root, batch_size=1, verify=False, progress=False)
    data.setup()
    module, dataset = make_module(root, "fpn"), data.val_dataset

    def perfect(batch, batch_idx):
        return [
            {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(len(target["labels"]))}
            for target in batch[1]
        ]

    module.validation_step = perfect
    for limit in (1.0, 0.5):
        evaluation = CocoEvaluation(dataset.ground_truth(), dataset.category_of_label)
        trainer = L.Trainer(
            accelerator="cpu", logger=False, callbacks=[evaluation], enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=limit,
        )  # fmt: skip
        trainer.validate(module, datamodule=data, verbose=False)
        assert evaluation.metrics["AP"] == pytest.approx(1.0)


def test_figures_logs_and_checkpoint(root, tmp_path):
    figures, timer, logger = SolverFigures(), StepTimer(), CSVLogger(tmp_path, name="csv", version="")
    module = make_module(root, preset="accurate")  # an approximate gradient has no solve to report
    trainer, _ = fit(module, root, tmp_path / "checkpoints", 1, figures, timer, validate=True, logger=logger)
    assert len(timer.seconds) == 2 and timer.median > 0

    summary = figures.validation
    assert summary is not None and 1 <= summary.mean_steps <= 20 and 0 <= summary.converged <= 1
    assert 0 <= figures.unsolved <= 1
    assert 0 < summary.median_residual <= summary.worst_residual
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("train/loss", "train/classification", "solver/mean_steps", "adjoint/mean_steps", "val/AP50"):
        assert any(row[name] for row in rows), name

    loaded = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert not loaded.training and differing(state_of(module), state_of(loaded)) == []
    image = torch.rand(3, SIZE, SIZE)
    mine, its = (m.eval().model([image])[0] for m in (module, loaded))
    assert torch.equal(mine["scores"], its["scores"])


def test_explicit_neck_has_no_solver_figures(root, tmp_path):
    figures = SolverFigures()
    fit(make_module(root, "fpn"), root, tmp_path, 1, figures, validate=True)
    assert figures.validation is None


def test_summary_is_over_samples(root):
    model = make_module(root).model.eval()
    solutions = []
    with torch.no_grad():
        for count in (1, 3):
            model([torch.rand(3, SIZE, SIZE) for _ in range(count)])
            solutions.append(model.backbone.fpn.last_solution)
    steps = torch.cat([solution.num_steps for solution in solutions]).double()
    assert len(steps) == 4
    assert summarize([Solves.of(s) for s in solutions]).mean_steps == pytest.approx(steps.mean().item())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), r"or is damaged or cut off \(5000 bytes\)$"),
        (lambda path: path.write_bytes(b""), r"or is damaged or cut off \(0 bytes\)$"),
        (lambda path: change(path, lambda c: c.pop("detection")), "it has no 'detection'$"),
        (lambda path: change(path, lambda c: c["state_dict"].pop("model.backbone.body.conv1.weight")),
         r"with resnet18 and fpn: it lacks model.backbone.body.conv1.weight \(1 such\)$"),
        (lambda path: change(path, lambda c: c["detection"]["detector"].update(neck="ifpn")),
         r"does not fit this detector, retinanet with resnet18 and ifpn: it lacks model.backbone.fpn"),
        (lambda path: change(path, lambda c: c.update(run=pickle.Pickler)), "it holds more than plain data$"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, damage, message):
    path = write_checkpoint(tmp_path / "a.ckpt", "fpn")
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(path)
    assert "a.ckpt" in str(error.value) and "\n" not in str(error.value)


def change(path, what):
    content = torch.load(path, weights_only=True)
    what(content)
    torch.save(content, path)


def test_a_checkpoint_keeps_solvers_and_adjoints(tmp_path):
    solver = deqkit.Auto((deqkit.Anderson(history=3), deqkit.Broyden()))
    given = {"solver": solver, "adjoint": deqkit.ImplicitAdjoint("gmres", rtol=1e-2), "autocast": torch.bfloat16}
    path = write_checkpoint(tmp_path / "a.ckpt", neck_settings=given)
    module = load_checkpoint(path)
    assert module.config.neck_settings == given
    neck = module.model.backbone.fpn
    assert neck.solver == solver and neck.adjoint == given["adjoint"]


@pytest.mark.parametrize("content", [None, "text", {"weights": 1}])
def test_foreign_checkpoint(tmp_path, content):
    path = tmp_path / "foreign.ckpt"
    if content is None:
        with pytest.raises(FileNotFoundError, match="foreign"):
            load_checkpoint(path)
        return
    path.write_text(content) if isinstance(content, str) else torch.save(content, path)
    with pytest.raises(ValueError, match="foreign.ckpt is not a checkpoint"):
        load_checkpoint(path)


def test_median_of_two_is_their_middle():
    solution = deqkit.solve(lambda x, b: 0.5 * x + b, torch.zeros(2, 1), args=(torch.ones(2, 1),), rtol=0.5)
    solution.relative_residual = torch.tensor([0.1, 0.3])
    assert summarize([Solves.of(solution)]).median_residual == pytest.approx(0.2)


def test_median_of_values_that_are_not_finite():
    nan, inf = float("nan"), float("inf")
    assert median_of(torch.tensor([nan, 1.0, 2.0])) == 2.0
    assert median_of(torch.tensor([inf, inf])) == inf


def test_unsolved_share_spans_a_resume():
    def solve(*slopes):
        """Two steps of x <- slope x + 1 from 0 solve the samples of slope 0 alone."""
        slope = torch.tensor(slopes)[:, None]
        return deqkit.solve(
            lambda x: slope * x + 1, torch.zeros_like(slope), solver="fixed_point", max_steps=2, on_failure="ignore"
        )

    first, second = SolverFigures(), SolverFigures()
    for solution in (solve(0.0, 0.9), solve(0.9)):
        first.count(solution)
    size = len(pickle.dumps(first))
    second.load_state_dict(first.state_dict())
    assert second.unsolved == first.unsolved == pytest.approx(2 / 3)
    second.count(solve(0.0))
    assert second.unsolved == pytest.approx(0.5)
    for _ in range(500):
        first.count(solution)
    assert len(pickle.dumps(first)) < size + 100 and first.unsolved == 502 / 503  # nothing is kept of a step


@pytest.mark.parametrize("setting", ["num_classes", "image_size", "max_size", "anchor_size", "neck_channels"])
def test_unusable_sizes_are_refused(setting):
    with pytest.raises(ValueError, match=setting):
        DetectorConfig(**({"num_classes": 3} | {setting: 0}))


@pytest.mark.parametrize("setting", [{"total_steps": 0}, {"lr": -1.0}, {"lr": float("nan")}, {"warmup_steps": -1}])
def test_unusable_schedules_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Schedule(**({"total_steps": 10} | setting))


@pytest.mark.parametrize("setting", [{"neck": "bifpn"}, {"backbone": "resnet19"}])
def test_unknown_names_are_refused(setting):
    with pytest.raises(ValueError, match="choose one of"):
        DetectorConfig(3, **setting)


def test_schedule():
    schedule = Schedule(100, warmup_steps=10)
    factors = [schedule.factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True) and factors[100] == pytest.approx(0.0)
    assert schedule.factor(500) == pytest.approx(0.0)


def test_pictures(root, tmp_path):
    data = CocoDataModule(root, verify=False)
    data.setup()
    images, targets = zip(*(data.val_dataset[i] for i in range(2)), strict=True)
    models = {"FPN": make_module(root, "fpn").model.eval(), "i-FPN": make_module(root).model.eval()}
    names = ["$\\bad$"] * 7  # no formula
    paths = [
        draw_detections(tmp_path / "a.png", models, images, targets, names, min_score=0.0),
        draw_feature_maps(tmp_path / "b.png", models, images),
    ]
    neck = models["i-FPN"].backbone.fpn
    with pytest.raises(ValueError, match="trace"):
        draw_residual_trace(tmp_path / "c.png", neck.last_solution)
    neck.trace = True
    with torch.no_grad():
        models["i-FPN"](list(images))
    paths.append(draw_residual_trace(tmp_path / "c.png", neck.last_solution, rtol=neck.rtol))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png", "c.png"}


def test_parameters_that_a_module_exempts_have_no_weight_decay(root):
    module = make_module(root, "fpn")
    torch.manual_seed(0)
    module.model = build_detector("autoassign", "resnet18", "fpn", weights_backbone=None, neck_channels=16)
    prior = module.model.center_prior
    assert [id(p) for p in exempt_from_decay(module.model)] == [id(prior.mu), id(prior.sigma)]
    groups = module.configure_optimizers()["optimizer"].param_groups
    without = [p for group in groups if group["weight_decay"] == 0 for p in group["params"]]
    assert {id(prior.mu), id(prior.sigma)} == {id(p) for p in without if p.dim() > 1}
    assert sum(len(group["params"]) for group in groups) == len(list(module.model.parameters()))
