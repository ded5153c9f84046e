"""Overfits every detector, with both necks, on a few drawn images: do assignment, losses and decoding fit together?

    python benchmarks/overfit_detectors.py --detectors atss autoassign --necks fpn ifpn --seeds 0 1 2

trains on the images that it evaluates on, from random weights and on one thread, and prints AP, seconds and how the
i-FPN's fixed points converged. A detector whose parts fit reaches a high AP; it says nothing about unseen images.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from reporting import describe, run_record
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNetHead

from adapters.detection import ImplicitFPN, build_detector
from adapters.detection.data import CocoDataModule, SyntheticSettings, generate_dataset
from adapters.detection.evaluation import coco_results, evaluate_coco

DETECTORS = ("retinanet", "fasterrcnn", "fcos", "fcos_paper", "atss", "autoassign")
NECKS = ("fpn", "ifpn")
CHANNELS = 64
WARMUP = 20
SETTINGS = ("detectors", "necks", "seeds", "images", "image_size", "steps", "lr")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=DETECTORS, help="default: all")
    parser.add_argument("--necks", nargs="+", choices=NECKS, default=NECKS, help="default: both")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of weights and images; default: 0")
    parser.add_argument("--images", type=int, default=4, help="how many; default: 4")
    parser.add_argument("--image-size", type=int, default=128, help="side in pixels; default: 128")
    parser.add_argument("--steps", type=int, default=150, help="optimiser steps, all images each; default: 150")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW, a tenth of it for G; default: 1e-3")
    return parser.parse_args(argv)


def build(detector: str, neck: str, num_classes: int, size: int) -> nn.Module:
    settings: dict[str, Any] = {"num_classes": num_classes, "neck_channels": CHANNELS, "weights_backbone": None}
    if detector == "retinanet":  # its head hardly learns from random weights without normalisation

        def norm(channels: int) -> nn.Module:
            return nn.GroupNorm(8, channels)

        settings["head"] = RetinaNetHead(CHANNELS, 9, num_classes, norm_layer=norm)
    if neck == "ifpn":
        settings["neck_settings"] = {"rtol": 1e-2, "on_failure": "ignore"}
    return build_detector(detector, "resnet18", neck, min_size=size, max_size=size, **settings)


def train(model: Any, images: list[Tensor], targets: list[dict[str, Tensor]], steps: int, lr: float) -> None:
    neck = model.backbone.fpn
    careful = {id(p) for p in neck.transform.parameters()} if isinstance(neck, ImplicitFPN) else set()
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in careful], "lr": lr},
        {"params": [p for p in model.parameters() if id(p) in careful], "lr": lr / 10},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)

    def factor(step: int) -> float:
        return (
            (step + 1) / WARMUP
            if step < WARMUP
            else 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))
        )

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(steps):
        loss = torch.stack(list(model(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()


def overfit(args: argparse.Namespace, detector: str, neck: str, seed: int, data: CocoDataModule) -> dict[str, Any]:
    dataset = data.val_dataset  # the training split would be flipped at random
    images, targets = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    objects = [{name: target[name] for name in ("boxes", "labels")} for target in targets]
    torch.manual_seed(seed)
    model: Any = build(detector, neck, dataset.num_classes, args.image_size)
    start = time.perf_counter()
    train(model, list(images), objects, args.steps, args.lr)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        detections = model.eval()(list(images))
    image_ids = [target["image_id"] for target in targets]
    results = coco_results(detections, image_ids, dataset.category_of_label)
    metrics = evaluate_coco(dataset.ground_truth(), results, image_ids)
    row = {"detector": detector, "neck": neck, "seed": seed, "AP": metrics["AP"], "AP50": metrics["AP50"]}
    row["seconds"] = seconds
    if isinstance(model.backbone.fpn, ImplicitFPN) and (solution := model.backbone.fpn.last_solution) is not None:
        row["steps"] = solution.num_steps.double().mean().item()
        row["residual"] = solution.relative_residual.max().item()
    return row


def table_line(row: dict[str, Any]) -> str:
    line = "{detector:<12} {neck:<5} {seed:>4} {AP:>6.3f} {AP50:>6.3f} {seconds:>8.1f}".format(**row)
    return line + (" {steps:>6.1f} {residual:>9.1e}".format(**row) if "steps" in row else "")


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    print(describe(run_record(torch.device("cpu"), None, {name: getattr(args, name) for name in SETTINGS})))
    print(f"{'detector':<12} {'neck':<5} {'seed':>4} {'AP':>6} {'AP50':>6} {'seconds':>8} {'steps':>6} {'residual':>9}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            root = Path(folder) / str(seed)
            drawn = SyntheticSettings(1, args.images, args.image_size, seed=seed)
            generate_dataset(root, drawn, progress=False)
            data = CocoDataModule(root, progress=False, verify=False)
            data.setup()
            for detector in args.detectors:
                for neck in args.necks:
                    row = overfit(args, detector, neck, seed, data)
                    rows.append(row)
                    print(table_line(row), flush=True)
    return rows


if __name__ == "__main__":
    main()
