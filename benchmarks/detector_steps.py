"""Average precision of a trained detector with the i-FPN neck against the steps of the neck's solver."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from options import NamedSolver
from reporting import DetectorError, format_table, synchronize
from torch import Tensor, nn
from torch.utils.data import DataLoader

from adapters.detection import ImplicitFPN
from adapters.detection.data import CocoDataModule, DataError, verify_images
from adapters.detection.evaluation import coco_results, evaluate_coco
from adapters.detection.training import load_checkpoint, median_of

Batches = Collection[tuple[list[Tensor], list[dict[str, Any]]]] | DataLoader
TOLERATED_LOSS = 0.001  # of AP on the scale 0..1: a tenth of a point


@dataclass(frozen=True)
class DetectorRow:
    """One evaluation of the detector.

    Attributes:
        solver: label of the solver.
        steps: steps of every solve; None for the neck's own tolerance and limit.
        images: number of images evaluated.
        ap: COCO's AP, 0 to 1; None where the set has no objects.
        ap50: AP at an overlap of 0.5.
        mean_steps: solver steps that were taken, mean over images.
        residual_median: relative residual of the pyramid in the neck's norm: median over images.
        residual_worst: the same of the worst image.
        seconds_per_image: wall time of the whole detector per image.
    """

    solver: str
    steps: int | None
    images: int
    ap: float | None
    ap50: float | None
    mean_steps: float
    residual_median: float
    residual_worst: float
    seconds_per_image: float


@dataclass(frozen=True)
class Detector:
    """A trained detector and the images to judge it by.

    Attributes:
        model: torchvision's detector with an `ImplicitFPN` neck, on the device to use.
        loader: batches of images and targets with ``image_id``.
        ground_truth: the images' annotations in COCO's format.
        category_of_label: COCO category id per label.
        data_root: where the images come from.
    """

    model: nn.Module
    loader: Batches
    ground_truth: dict[str, Any]
    category_of_label: Sequence[int]
    data_root: Path

    @property
    def neck(self) -> ImplicitFPN:
        """The implicit FPN."""
        return next(module for module in self.model.modules() if isinstance(module, ImplicitFPN))

    @property
    def num_images(self) -> int:
        """Images evaluated."""
        return len(self.ground_truth["images"])

    @property
    def num_batches(self) -> int:
        """Batches they come in."""
        return len(self.loader)


def load(checkpoint: Path, data_root: Path | None, images: int | None, device: str) -> Detector:
    """A detector from a checkpoint of examples/retinanet_ifpn.py, with the validation images of its data.

    Args:
        checkpoint: the file.
        data_root: folder in the COCO layout; None for the one that the checkpoint remembers, under the same limit on
            the number of images as in the training.
        images: use the first images only.
        device: where the detector runs.

    Raises:
        DetectorError: checkpoint or data cannot be used, do not belong together, or the neck is not implicit.
    """
    try:
        module = load_checkpoint(checkpoint)
    except (OSError, ValueError) as error:
        raise DetectorError(str(error)) from error
    if not isinstance(module.neck, ImplicitFPN):
        raise DetectorError(f"{checkpoint} holds a detector with the neck {module.config.neck!r}: nothing to solve")
    remembered: dict[str, Any] = module.data
    if data_root is None:
        if "root" not in remembered:
            raise DetectorError(f"{checkpoint} does not say what data it was trained on: give --data")
        data_root = Path(remembered["root"])
        images = images or remembered.get("limit_val_images")
    data = CocoDataModule(data_root, limit_val_images=images, batch_size=remembered.get("batch_size", 4), verify=False)
    try:
        data.setup()
        # Only the images that are used are decoded, not those of the training.
        verify_images(data.val_dataset.annotations, data.val_dataset.folder, progress=sys.stderr.isatty())
    except DataError as error:
        raise DetectorError(str(error)) from error
    dataset = data.val_dataset
    if dataset.num_classes != module.config.num_classes:
        raise DetectorError(
            f"{checkpoint} was trained for {module.config.num_classes - 1} categories, {data_root} has "
            f"{dataset.num_classes - 1}"
        )
    if remembered.get("categories", dataset.categories) != dataset.categories:
        raise DetectorError(f"{checkpoint} was trained for other categories than those of {data_root}")
    model = module.model.to(device).eval()
    return Detector(model, data.val_dataloader(), dataset.ground_truth(), dataset.category_of_label, data_root)


def sweep(
    detector: Detector, solvers: Sequence[NamedSolver], steps: Sequence[int], tick: Callable[[], Any]
) -> list[DetectorRow]:
    """Evaluate the detector as it is, then with every solver and number of steps; the neck's settings are restored.

    Args:
        detector: what to evaluate.
        solvers: the solvers.
        steps: numbers of solver steps, all at least 1.
        tick: called after every batch.
    """
    neck = detector.neck
    own = {name: getattr(neck, name) for name in ("solver", "rtol", "eval_max_steps", "on_failure")}
    was_training = detector.model.training
    detector.model.eval()
    try:
        neck.on_failure = "ignore"  # the rows say how far each solve came
        with torch.no_grad():  # a first batch, so that nothing is warming up on the clock
            detector.model(_first_images(detector))
        rows = [_evaluate(detector, "own settings", None, tick)]
        neck.rtol = 0.0
        for named in solvers:
            neck.solver = named.solver
            for k in steps:
                neck.eval_max_steps = k
                rows.append(_evaluate(detector, named.label, k, tick))
    finally:
        for name, value in own.items():
            setattr(neck, name, value)
        detector.model.train(was_training)
    return rows


def _first_images(detector: Detector) -> list[Tensor]:
    images, _ = next(iter(detector.loader))
    device = next(detector.model.parameters()).device
    return [image.to(device) for image in images]


def _evaluate(detector: Detector, label: str, steps: int | None, tick: Callable[[], Any]) -> DetectorRow:
    device = next(detector.model.parameters()).device
    results: list[dict[str, Any]] = []
    residuals, taken, seconds = [], [], 0.0
    for batch, targets in detector.loader:
        images = [image.to(device) for image in batch]
        synchronize(device)
        start = time.perf_counter()
        with torch.no_grad():
            outputs = detector.model(images)
        synchronize(device)
        seconds += time.perf_counter() - start
        solution = detector.neck.last_solution
        assert solution is not None
        residuals.append(solution.relative_residual.double().cpu())
        taken.append(solution.num_steps.double().cpu())
        results += coco_results(outputs, [target["image_id"] for target in targets], detector.category_of_label)
        tick()
    figures = evaluate_coco(detector.ground_truth, results)
    residual = torch.cat(residuals)
    return DetectorRow(
        solver=label,
        steps=steps,
        images=len(residual),
        ap=figures["AP"],
        ap50=figures["AP50"],
        mean_steps=torch.cat(taken).mean().item(),
        residual_median=median_of(residual),
        residual_worst=residual.max().item(),
        seconds_per_image=seconds / len(residual),
    )


def answer(rows: Sequence[DetectorRow], label: str) -> str:
    """How many steps the neck needs with one solver, in one line computed from its rows with fixed steps."""
    mine = [(row.steps, row.ap) for row in rows if row.solver == label and row.steps is not None]
    known = [(steps, ap) for steps, ap in mine if ap is not None]
    if not known or len(known) < len(mine):
        return f"{label}: no AP exists for this set, it has no objects to find"
    most, reference = known[-1]
    if len(known) == 1:
        return f"{label}: {most} steps alone do not say how many are needed"
    if reference == 0:
        return f"{label}: AP is 0 with {most} steps, so it does not say how many steps are needed"
    needed, ap = next((k, ap) for i, (k, ap) in enumerate(known) if _all_close(known[i:], reference))
    if needed == most:
        before, last = known[-2]
        return (
            f"{label}: {most} steps may not be enough: AP still changes by more than {100 * TOLERATED_LOSS:g} points "
            f"from {before} to {most} steps ({100 * last:.1f} and {100 * reference:.1f})"
        )
    return (
        f"{label}: {needed} steps are enough: from there on AP stays within {100 * TOLERATED_LOSS:g} points of that of "
        f"{most} steps ({100 * ap:.1f} and {100 * reference:.1f})"
    )


def _all_close(entries: Sequence[tuple[int, float]], reference: float) -> bool:
    return all(abs(ap - reference) <= TOLERATED_LOSS + 1e-12 for _, ap in entries)


def detector_table(rows: Sequence[DetectorRow]) -> str:
    """The rows for the terminal; AP in points, as in the literature."""
    header = ["solver", "steps", "AP", "AP50", "residual, median", "worst", "ms per image"]
    lines = []
    for row in rows:
        steps = f"{row.mean_steps:.1f}" if row.steps is None else str(row.steps)
        aps = ["n/a" if ap is None else f"{100 * ap:.1f}" for ap in (row.ap, row.ap50)]
        residuals = [f"{row.residual_median:.1e}", f"{row.residual_worst:.1e}"]
        lines.append([row.solver, steps, *aps, *residuals, f"{1e3 * row.seconds_per_image:.1f}"])
    return format_table(header, lines)
