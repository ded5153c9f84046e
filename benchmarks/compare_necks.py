"""Does i-FPN detect better than FPN, at equal budgets? Every detector with both necks, over several seeds.

Trains each pair on a drawn set from random weights, with the same images, steps and schedule, evaluates on images never
seen, and prints AP as mean and spread over the seeds, whichever neck wins. A training that was finished is not done
again: the same command continues. One to three minutes per training on two CPU cores.

    python benchmarks/compare_necks.py
    python benchmarks/compare_necks.py --detectors atss --seeds 0 1 2 3 4 --steps 2000
    python benchmarks/compare_necks.py --necks paper fast 1e-1/neumann-3 --w-scale 2 --checkpoints

Other necks than these two are i-FPNs that solve for their fixed point in another way (`detector_cost.py`).
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

import lightning as L
import torch
from detector_cost import ALL_VARIANTS, EXPLICIT, Counted, counted_calls
from lightning.pytorch.callbacks import TQDMProgressBar
from reporting import describe, format_table, run_record, write_csv, write_json

from adapters.detection import ImplicitFPN
from adapters.detection.data import CocoDataModule, SyntheticSettings, generate_dataset
from adapters.detection.evaluation import CocoEvaluation
from adapters.detection.training import DetectionModule, DetectorConfig, Schedule, SolverFigures, StepTimer

DETECTORS = ("retinanet", "fasterrcnn", "fcos_paper", "atss", "autoassign")
NECKS = ("fpn", "ifpn")  # compared unless others are asked for; "ifpn" solves to 1e-2
SOLVES = {"ifpn": {"rtol": 1e-2}} | {name: how for name, how in ALL_VARIANTS.items() if name != EXPLICIT}
# A small image has few objects: proposals by the thousand, as for COCO, would be most of the time.
FEW_PROPOSALS = {
    f"rpn_{when}_nms_top_n_{mode}": count for when, count in (("pre", 500), ("post", 250)) for mode in ("train", "test")
} | {"box_batch_size_per_image": 128}
ROWS, RECORD = "rows.csv", "run.json"


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        detector: which one.
        neck: "fpn", "ifpn" (the preset "accurate") or another way to solve for its fixed point.
        seed: of weights, order and augmentation; the images are the same for all.
        steps: optimiser steps.
        ap: COCO's AP on the validation images.
        ap50: the same at an IoU of 0.5.
        seconds_per_step: median.
        solver_steps: mean over the validation images; NaN for "fpn".
        converged: share of the validation images whose solve met its tolerance; NaN for "fpn".
        skipped: steps that were left out because loss or gradient was not finite.
        calls: what a training step calls G for, in evaluations, mean over the last half of them; 0 for "fpn".
    """

    detector: str
    neck: str
    seed: int
    steps: int
    ap: float
    ap50: float
    seconds_per_step: float
    solver_steps: float
    converged: float
    skipped: int
    calls: float


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS), help="default: all")
    parser.add_argument(
        "--necks", nargs="+", choices=[EXPLICIT, *SOLVES], default=list(NECKS), help="default: fpn ifpn"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps; default: 400")
    parser.add_argument("--batch-size", type=int, default=4, help="images per step; default: 4")
    parser.add_argument("--train-images", type=int, default=400, help="default: 400")
    parser.add_argument("--val-images", type=int, default=100, help="default: 100")
    parser.add_argument("--image-size", type=int, default=96, help="side in pixels; default: 96")
    parser.add_argument("--channels", type=int, default=64, help="of every pyramid level; default: 64")
    parser.add_argument("--backbone", default="resnet18", help="default: resnet18")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW, a tenth of it for G; default: 1e-3")
    parser.add_argument(
        "--w-scale", type=float, default=1.0,
        help="on the first weights of the cross-scale connection: 64 channels at 2 contract as 256 at 1; default: 1",
    )  # fmt: skip
    parser.add_argument("--checkpoints", action="store_true", help="keep the trained detectors, with their preset")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_necks"), help="folder of images and results")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "train_images", "val_images", "channels"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not 0 < args.w_scale < float("inf"):
        parser.error(f"--w-scale must be positive, got {args.w_scale}")
    return args


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """What the rows of one folder have in common."""
    return {k: v for k, v in vars(args).items() if k not in ("detectors", "necks", "seeds", "out", "checkpoints")}


def quiet_lightning() -> None:
    """Leave out what Lightning says about its own settings; its errors still come through."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")


def make_data(args: argparse.Namespace, seed: int) -> CocoDataModule:
    root = args.out / "data"
    drawn = SyntheticSettings(args.train_images, args.val_images, 2 * args.image_size, seed=0)
    generate_dataset(root, drawn, progress=not root.exists())
    data = CocoDataModule(root, batch_size=args.batch_size, seed=seed, verify=False, progress=False)
    data.setup()
    return data


def fit(
    args: argparse.Namespace,
    detector: str,
    neck: str,
    seed: int,
    data: CocoDataModule,
    prepare: Callable[[DetectionModule], object] = lambda module: None,
    callbacks: Sequence[L.Callback] = (),
) -> tuple[DetectionModule, StepTimer]:
    """A detector trained from random weights, which ``prepare`` may change first, and what its steps took.

    Raises:
        KeyboardInterrupt: it was stopped before the end.
    """
    L.seed_everything(seed, verbose=False)
    config = DetectorConfig(
        data.num_classes, "fpn" if neck == "fpn" else "ifpn", detector, args.backbone, args.channels,
        neck_settings=dict(SOLVES.get(neck, {})), image_size=args.image_size,
        options=FEW_PROPOSALS if detector == "fasterrcnn" else {},
    )  # fmt: skip
    schedule = Schedule(args.steps, lr=args.lr, warmup_steps=min(100, max(1, args.steps // 10)), seed=seed)
    module, timer = DetectionModule(config, schedule), StepTimer()
    prepare(module)
    trainer = L.Trainer(
        accelerator=args.device, devices=1, max_steps=args.steps, gradient_clip_val=10.0, num_sanity_val_steps=0,
        limit_val_batches=0, reload_dataloaders_every_n_epochs=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[timer, *callbacks, TQDMProgressBar(refresh_rate=20, leave=False)],
    )  # fmt: skip
    try:
        trainer.fit(module, datamodule=data)
    except SystemExit:  # Lightning's way to end on Ctrl-C
        if not trainer.interrupted:
            raise
    if trainer.interrupted:  # what there is by then must not pass for trained
        raise KeyboardInterrupt
    return module, timer


def train(args: argparse.Namespace, detector: str, neck: str, seed: int) -> Row:
    data, calls = make_data(args, seed), CallsOfG()
    module, timer = fit(args, detector, neck, seed, data, lambda module: scale_w_(module.neck, args.w_scale), [calls])
    if args.checkpoints:
        keep(module, args.out / f"{detector}_{neck.replace('/', '_')}_{seed}.ckpt")
    val = data.val_dataset
    evaluation = CocoEvaluation(val.ground_truth(), val.category_of_label)
    figures = SolverFigures()
    judge = L.Trainer(
        accelerator=args.device, devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[evaluation, figures],
    )  # fmt: skip
    judge.validate(module, datamodule=data, verbose=False)
    summary, nan = figures.validation, float("nan")
    ap, ap50 = (evaluation.metrics[name] for name in ("AP", "AP50"))
    assert ap is not None and ap50 is not None  # the data were checked for objects
    solver_steps, converged = (summary.mean_steps, summary.converged) if summary else (nan, nan)
    skipped = module.skipped_steps
    return Row(detector, neck, seed, args.steps, ap, ap50, timer.median, solver_steps, converged, skipped, calls.mean)


def keep(module: DetectionModule, path: Path) -> None:
    """Write a checkpoint; of the settings of the solve it has the preset.

    Plain values alone can be kept, and what reads these checkpoints chooses solver and adjoint itself.
    """
    preset = {name: value for name, value in module.config.neck_settings.items() if name == "preset"}
    module.config = replace(module.config, neck_settings=preset)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)


@torch.no_grad()
def scale_w_(neck: torch.nn.Module, factor: float) -> None:
    """Scale the weights of an implicit neck's cross-scale connection."""
    if isinstance(neck, ImplicitFPN) and factor != 1:
        for name, p in neck.transform.named_parameters():
            if name.startswith("cross_scale."):
                p.mul_(factor)


class CallsOfG(L.Callback):
    """Counts what training steps call G for, from half time on: at the start other weights take other numbers."""

    def __init__(self) -> None:
        self._counted, self._steps, self._open = Counted(), 0, ExitStack()

    @property
    def mean(self) -> float:
        """Per step, in evaluations of G."""
        return self._counted.calls.equivalents / max(self._steps, 1)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Begin to count."""
        if 2 * trainer.global_step >= trainer.max_steps:
            self._steps += 1
            self._open.enter_context(counted_calls(pl_module.neck, self._counted))

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop."""
        self._open.close()


def finished(folder: Path) -> list[Row]:
    """The rows of an earlier run of the same command."""
    path = folder / ROWS
    if not path.exists():
        return []
    kinds = {"detector": str, "neck": str, "seed": int, "steps": int, "skipped": int}
    with path.open(newline="") as file:
        return [
            Row(**{f.name: kinds.get(f.name, float)(line[f.name]) for f in fields(Row)})
            for line in csv.DictReader(file)
        ]


def refuse_to_mix(args: argparse.Namespace) -> None:
    """Rows of one table must be of equal budgets: those of other settings are not gone on with."""
    path = args.out / RECORD
    before = json.loads(path.read_text())["settings"] if path.exists() else {}
    for name, value in settings_of(args).items():
        if before.get(name) != value:
            option = f"--{name.replace('_', '-')} {before.get(name)}"
            raise SystemExit(f"error: {args.out} holds rows of {option}, not {value}: --out goes elsewhere")


def summary_table(rows: Sequence[Row]) -> str:
    header = ["detector", "neck", "seeds", "AP", "AP50", "s/step", "solver steps", "converged", "skipped", "calls of G"]
    lines = []
    for detector in DETECTORS:
        for neck in (EXPLICIT, *SOLVES):
            group = [row for row in rows if (row.detector, row.neck) == (detector, neck)]
            if not group:
                continue
            line = [detector, neck, str(len(group)), *(spread([getattr(r, k) for r in group]) for k in ("ap", "ap50"))]
            line.append(f"{mean(r.seconds_per_step for r in group):.2f}")
            solved = neck != EXPLICIT
            line.append(f"{mean(r.solver_steps for r in group):.1f}" if solved else "-")
            line.append(f"{mean(r.converged for r in group):.1%}" if solved else "-")
            line.append(str(sum(r.skipped for r in group)))
            lines.append([*line, f"{mean(r.calls for r in group):.1f}" if solved else "-"])
    return format_table(header, lines)


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{mean(values):.3f} +- {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def main(argv: Sequence[str] | None = None) -> list[Row]:
    args = parse_arguments(argv)
    quiet_lightning()
    record = run_record(torch.device(args.device), None, settings_of(args))
    print(describe(record), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / ROWS).exists():
        refuse_to_mix(args)
    rows = finished(args.out)
    write_json(args.out / RECORD, record)
    done = {(row.detector, row.neck, row.seed) for row in rows}
    for seed in args.seeds:  # the outer loop: an interrupted run has whole comparisons
        for detector in args.detectors:
            for neck in args.necks:
                if (detector, neck, seed) not in done:
                    rows.append(train(args, detector, neck, seed))
                    write_csv(args.out / ROWS, rows)
                    print({k: v for k, v in asdict(rows[-1]).items() if v == v}, flush=True)
    print(summary_table(rows))
    return rows


if __name__ == "__main__":
    main()
