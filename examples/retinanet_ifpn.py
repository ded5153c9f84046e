"""Train RetinaNet with the implicit FPN (i-FPN) and with the explicit FPN, and compare them.

Without arguments it draws a detection set, trains both on the CPU in about eight minutes, and leaves tables, pictures,
logs and checkpoints in runs/retinanet_ifpn. With --data it trains on any folder in the COCO-2017 layout.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import shutil
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, TQDMProgressBar

from adapters.detection.data import CocoDataModule, DataError, SyntheticSettings, generate_dataset
from adapters.detection.data.synthetic import CONTENTS, MANIFEST
from adapters.detection.evaluation import CocoEvaluation, format_metric
from adapters.detection.files import written_whole
from adapters.detection.training import (
    DetectionModule,
    DetectorConfig,
    Schedule,
    SolverFigures,
    StepTimer,
    best_checkpoint,
    last_checkpoint,
    load_checkpoint,
    make_loggers,
)
from adapters.detection.visualize import draw_detections, draw_feature_maps, draw_residual_trace

TITLES = {"ifpn": "i-FPN", "fpn": "FPN"}
NECKS = tuple(TITLES)
RESIDUALS = ("median_residual", "worst_residual")
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
SUMMARY, TABLE, SETTINGS = "summary.json", "summary.csv", "settings.json"
PICTURES = ("detections.png", "feature_maps.png", "residual_trace.png")
FILES = (SUMMARY, TABLE, SETTINGS, *PICTURES)
RUN = {*FILES, "data", *NECKS, "data.partial", *(f".{name}.partial" for name in FILES)}  # what a run leaves in --out
RUN_OF_NECK = {"checkpoints", "csv", "tensorboard", "metrics.json", "detections.json"}
RUN_OF_NECK |= {f".{name}.partial" for name in RUN_OF_NECK}
FREE_TO_CHANGE = {"neck", "num_workers", "device", "out", "resume", "overwrite"}  # on --resume


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, metavar="ROOT", help="folder in COCO-2017 layout; default: a drawn set")
    data.add_argument("--train-images", type=int, metavar="N", help="use (or draw) N training images only")
    data.add_argument("--val-images", type=int, metavar="N", help="use (or draw) N validation images only")
    data.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="shorter side of the images; default: 96 drawn, 256 else"
    )
    data.add_argument("--num-workers", type=int, default=0, metavar="N", help="processes that load images")
    model = parser.add_argument_group("model")
    model.add_argument("--neck", choices=("both", *NECKS), default="both", help="which necks to train")
    model.add_argument("--arch", choices=("resnet18", "resnet50"), default="resnet18", help="backbone")
    model.add_argument("--neck-channels", type=int, default=64, metavar="N", help="channels of every pyramid level")
    model.add_argument("--weights-backbone", metavar="W", help="torchvision name or file; default: train from scratch")
    model.add_argument(
        "--solver", choices=("anderson", "broyden", "fixed_point"), help="default: the neck's own, Anderson"
    )
    model.add_argument("--max-steps", type=int, metavar="N", help="limit of solver steps; default: the neck's own")
    model.add_argument("--rtol", type=float, default=1e-2, help="relative tolerance of the solver")
    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=int, metavar="N", help="default: 5 drawn, 20 else")
    train.add_argument("--batch-size", type=int, default=4, metavar="N", help="images per step")
    train.add_argument("--lr", type=float, default=1e-3, help="learning rate after the warm-up (AdamW, cosine)")
    train.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    train.add_argument("--seed", type=int, default=0, help="seed of data, weights and order")
    train.add_argument("--out", type=Path, default=Path("runs/retinanet_ifpn"), help="folder of the results")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in --out; give the same options")
    existing.add_argument("--overwrite", action="store_true", help="delete the run in --out first")
    args = parser.parse_args(argv)
    for name in ("train_images", "val_images", "image_size", "neck_channels", "max_steps", "epochs", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("num_workers", "seed"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}")
    if args.seed >= 2**32:  # NumPy's limit
        parser.error(f"--seed must be below 2**32, got {args.seed}")
    if not 0 < args.rtol < 1:
        parser.error(f"--rtol must be between 0 and 1, got {args.rtol}")
    if not 0 < args.lr < math.inf:
        parser.error(f"--lr must be a positive number, got {args.lr}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    args.image_size = args.image_size or (256 if args.data else 96)
    args.epochs = args.epochs or (20 if args.data else 5)
    return args


def check_out(args: argparse.Namespace) -> None:
    """An earlier run is neither mixed with a new one nor lost by accident, nor is anything else that lies in --out."""
    out = args.out
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file")
    if args.data is not None and args.data.resolve().is_relative_to(out.resolve()):
        raise DataError(f"--out {out} contains --data {args.data}: choose another folder for the results")
    found = {path.name for path in out.iterdir()} if out.exists() else set()
    foreign = foreign_files(out) if found else []
    if foreign:
        raise DataError(f"--out {out} holds other files ({foreign[0]}): choose another folder")
    if args.resume and not found:
        raise DataError(f"--resume: there is no run in {out}")
    if found and not args.resume and not args.overwrite:
        raise DataError(
            f"{out} already holds a run: --resume continues it, --overwrite deletes it, --out goes elsewhere"
        )
    if args.resume and (out / SETTINGS).exists():
        before, now = read_settings(out), settings_of(args)
        for name in now:
            if before.get(name) != now[name]:
                option = f"--{name.replace('_', '-')}"
                how = f"without {option}" if before.get(name) is None else f"with {option} {before[name]}"
                raise DataError(f"--resume: the run in {out} was started {how}")


def foreign_files(out: Path) -> list[str]:
    """What lies in --out and is not a run's."""
    found = {path.name for path in out.iterdir()}
    foreign = sorted(found - RUN)
    if "data" in found and not (out / "data" / MANIFEST).exists():
        foreign.append("data")
    if SETTINGS in found and "epochs" not in read_settings(out):  # a common name
        foreign.append(SETTINGS)
    known = {neck: RUN_OF_NECK for neck in NECKS} | {"data": CONTENTS, "data.partial": CONTENTS}
    for folder in sorted(found & known.keys() - set(foreign)):
        inside = {path.name for path in (out / folder).iterdir()} if (out / folder).is_dir() else {""}
        foreign += [f"{folder}/{name}" for name in sorted(inside - known[folder])]
    return foreign


def read_settings(out: Path) -> dict[str, Any]:
    """The options that the run in --out was started with."""
    try:
        content = json.loads((out / SETTINGS).read_text())
    except ValueError as error:
        raise DataError(f"--out: {out / SETTINGS} is not valid json: {error}") from None
    return content if isinstance(content, dict) else {}


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a run must keep when it is resumed."""
    values = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    return values | {"data": None if args.data is None else str(args.data.resolve())}


def check_model(args: argparse.Namespace, necks: list[str]) -> None:
    """Builds the models once, so that unusable options are refused before anything is written."""
    try:
        for neck in necks:
            detector(args, num_classes=2, neck=neck).build(args.weights_backbone)
    except (ValueError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"the model cannot be built: {reason}") from None


def detector(args: argparse.Namespace, num_classes: int, neck: str) -> DetectorConfig:
    given = {"solver": args.solver, "max_steps": args.max_steps, "rtol": args.rtol} if neck == "ifpn" else {}
    return DetectorConfig(
        num_classes, neck, backbone=args.arch, neck_channels=args.neck_channels, image_size=args.image_size,
        neck_settings={name: value for name, value in given.items() if value is not None},
    )  # fmt: skip


def clear_out(args: argparse.Namespace) -> None:
    """Deletes the earlier run, and nothing that is not one's."""
    for name in RUN:
        path = args.out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def prepare_data(args: argparse.Namespace) -> CocoDataModule:
    """The data, checked; a given folder is checked before anything is written."""
    limits = {"limit_train_images": args.train_images, "limit_val_images": args.val_images}
    root = args.data
    if root is None:
        if args.image_size < 48:
            raise DataError(f"--image-size {args.image_size}: drawn images need at least 48 pixels")
        counts = {"train_images": args.train_images, "val_images": args.val_images}
        settings = SyntheticSettings(
            image_size=2 * args.image_size, seed=args.seed, **{k: v for k, v in counts.items() if v is not None}
        )
        root, limits = args.out / "data", {}
        if args.overwrite:
            clear_out(args)
        try:
            generate_dataset(root, settings)
        except FileExistsError as error:
            raise DataError(f"{error}: --resume needs the options of the first run") from None
    data = CocoDataModule(root, batch_size=args.batch_size, num_workers=args.num_workers, seed=args.seed, **limits)
    data.setup()
    data.refuse_thin_images(DetectorConfig(2, image_size=args.image_size).longest_side)
    if args.overwrite and args.data is not None:
        clear_out(args)
    print(data.report())
    return data


def make_module(args: argparse.Namespace, data: CocoDataModule, neck: str) -> DetectionModule:
    L.seed_everything(args.seed, verbose=False)
    config = detector(args, data.train_dataset.num_classes, neck)
    total = args.epochs * steps_per_epoch(args, data)
    schedule = Schedule(total, lr=args.lr, warmup_steps=min(100, max(1, total // 10)), seed=args.seed)
    return DetectionModule(config, schedule, args.weights_backbone, data.describe())


def steps_per_epoch(args: argparse.Namespace, data: CocoDataModule) -> int:
    return max(1, len(data.train_dataset) // args.batch_size)


def validation_interval(epochs: int) -> int:
    """Epochs between two validations: about four in all, and one after the last epoch."""
    divisors = [n for n in range(1, epochs + 1) if epochs % n == 0]
    return min(divisors, key=lambda n: abs(math.log(epochs / n / 4)))


def train(args: argparse.Namespace, data: CocoDataModule, neck: str) -> dict[str, Any]:
    """Train and evaluate one neck; the row of the closing table."""
    folder = args.out / neck
    done = folder / "metrics.json"
    if done.exists():
        print(f"{TITLES[neck]}: already trained, see {done}")
        return json.loads(done.read_text())
    print(f"\n{TITLES[neck]}: training for {args.epochs} epochs")
    module = make_module(args, data, neck)
    val = data.val_dataset
    evaluation = CocoEvaluation(val.ground_truth(), val.category_of_label, folder / "detections.json")
    figures, timer = SolverFigures(), StepTimer()
    trainer = L.Trainer(
        accelerator=args.device, devices=1, max_epochs=args.epochs, gradient_clip_val=10.0, num_sanity_val_steps=0,
        check_val_every_n_epoch=validation_interval(args.epochs),
        log_every_n_steps=min(10, steps_per_epoch(args, data)),
        reload_dataloaders_every_n_epochs=1, enable_model_summary=False,
        logger=make_loggers(folder),
        callbacks=[
            evaluation, figures, timer, last_checkpoint(folder, save_on_train_epoch_end=True), best_checkpoint(folder),
            LearningRateMonitor("step"), TQDMProgressBar(refresh_rate=5),
        ],
    )  # fmt: skip
    last = folder / "checkpoints" / "last.ckpt"
    start = last if args.resume and last.exists() else None
    if start is not None:
        trained_model(args, neck)  # says in one line what is wrong with it
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    except SystemExit:  # Lightning's way to end on Ctrl-C, once it has closed loggers and workers
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    if not evaluation.metrics:  # resumed after the last epoch
        trainer.validate(module, datamodule=data, verbose=False)
    row: dict[str, Any] = {"neck": neck} | {name: evaluation.metrics[name] for name in METRICS}
    row["parameters"] = sum(p.numel() for p in module.model.parameters())
    row["seconds_per_step"] = timer.median if timer.seconds else None
    row["skipped_steps"] = module.skipped_steps
    if figures.validation:
        row |= asdict(figures.validation) | {"unsolved": figures.unsolved}
    write_json(done, row)
    return row


def write_json(path: Path, content: Any) -> None:
    with written_whole(path) as partial:
        partial.write_text(json.dumps(without_nan(content), indent=2, allow_nan=False))


def without_nan(content: Any) -> Any:
    """``content`` with null for every number that is not finite, which json does not know."""
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def format_share(share: float) -> str:
    """A percentage that says 0% and 100% only where that is exact."""
    if 0 < share < 0.001 or 0.999 < share < 1:
        return "<0.1%" if share < 0.5 else ">99.9%"
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def print_table(rows: list[dict[str, Any]]) -> None:
    header = ["neck", *METRICS, "parameters", "s/step", "solver steps", "residual (median, worst)", "converged"]
    lines = [header]
    for row in rows:
        line = [TITLES[row["neck"]], *(format_metric(row[name]) for name in METRICS)]
        line += [f"{row['parameters'] / 1e6:.2f} M", format_metric(row["seconds_per_step"])]
        if "mean_steps" in row:
            residuals = ", ".join("n/a" if row[k] is None else f"{row[k]:.1e}" for k in RESIDUALS)
            line += [f"{row['mean_steps']:.1f}", residuals, format_share(row["converged"])]
        else:
            line += ["-"] * 3
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    print()
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    for row in rows:
        if row["skipped_steps"]:
            title, count = TITLES[row["neck"]], row["skipped_steps"]
            print(f"{title}: {count} steps were skipped because the loss or the gradient was not finite")
        if row.get("unsolved"):
            share = format_share(row["unsolved"])
            print(f"{TITLES[row['neck']]}: {share} of the training solves stopped above their tolerance")


def trained_model(args: argparse.Namespace, neck: str) -> Any:
    try:
        return load_checkpoint(args.out / neck / "checkpoints" / "last.ckpt").model
    except ValueError as error:
        raise DataError(str(error)) from None


def draw_pictures(args: argparse.Namespace, data: CocoDataModule, necks: list[str]) -> list[Path]:
    models = {TITLES[neck]: trained_model(args, neck) for neck in necks}
    dataset = data.val_dataset
    busiest = sorted(range(len(dataset)), key=lambda i: -len(dataset.boxes(i)))
    chosen = sorted(busiest[: max(1, len(busiest) // 2)][:: max(1, len(busiest) // 10)][:4])
    images, targets = zip(*(dataset[i] for i in chosen), strict=True)
    pictures = [draw_detections(args.out / "detections.png", models, images, targets, dataset.class_names)]
    explicit_first = dict(sorted(models.items()))
    pictures.append(draw_feature_maps(args.out / "feature_maps.png", explicit_first, images[:3]))
    if "i-FPN" in models:
        model = models["i-FPN"]
        neck: Any = model.backbone.fpn
        tolerance, limit = neck.rtol, neck.eval_max_steps
        # Beyond the tolerance, to show where the residual would go; down to what float32 resolves.
        neck.trace, neck.rtol, neck.eval_max_steps = True, 1e-6, 40
        with torch.no_grad():
            model(list(images))
        neck.trace, neck.rtol, neck.eval_max_steps = False, tolerance, limit
        pictures.append(draw_residual_trace(args.out / "residual_trace.png", neck.last_solution, rtol=tolerance))
    return pictures


def quiet_lightning() -> None:
    """Leave out what Lightning says about its own settings; its errors still come through."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory.*exists.*",
        ".*training_step.*returned.*None.*",
        ".*LeafSpec.*is deprecated.*",  # Lightning's own use of PyTorch
    ):
        warnings.filterwarnings("ignore", message)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    quiet_lightning()
    necks: list[str] = [*NECKS] if args.neck == "both" else [args.neck]
    try:
        check_out(args)
        check_model(args, necks)
        data = prepare_data(args)
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / SETTINGS, settings_of(args))
        # A resumed run for one neck keeps the other's row and pictures.
        necks = [neck for neck in NECKS if neck in necks or (args.out / neck / "metrics.json").exists()]
        report(args, data, [train(args, data, neck) for neck in necks])
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "the same command with --resume continues after the last whole epoch"
        print(f"\nstopped: {hint if args.out.exists() else 'nothing was started'}", file=sys.stderr)
        return 130
    return 0


def report(args: argparse.Namespace, data: CocoDataModule, rows: list[dict[str, Any]]) -> None:
    """Tables and pictures of all necks."""
    print_table(rows)
    write_json(args.out / SUMMARY, {"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": rows})
    with written_whole(args.out / TABLE) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    for picture in draw_pictures(args, data, [row["neck"] for row in rows]):
        print(f"picture: {picture}")
    print(f"tables, logs and checkpoints: {args.out}")


if __name__ == "__main__":
    sys.exit(main())
