"""COCO average precision, computed by pycocotools, and the Lightning callback that collects what it needs."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from adapters.detection.files import written_whole

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""The twelve figures of COCO's summary, in its order; s, m, l stand for small, medium and large objects."""


def coco_results(
    outputs: Sequence[dict[str, Tensor]], image_ids: Sequence[Any], category_of_label: Sequence[int]
) -> list[dict[str, Any]]:
    """Turns a detector's outputs into COCO's results format.

    Args:
        outputs: Per image ``boxes`` (N, 4) as corners, ``scores`` (N,) and ``labels`` (N,), as torchvision's
            detectors give them.
        image_ids: Id of every image.
        category_of_label: Category id per label; entry 0 is the background's and is not used.

    Returns:
        One entry per detection; boxes as [x, y, w, h].
    """
    results = []
    for output, image_id in zip(outputs, image_ids, strict=True):
        boxes, scores, labels = (output[key].tolist() for key in ("boxes", "scores", "labels"))
        for (x1, y1, x2, y2), score, label in zip(boxes, scores, labels, strict=True):
            if label == 0:  # the background: category 0, if there is one, is another thing
                continue
            bbox = [x1, y1, x2 - x1, y2 - y1]
            entry = {"image_id": image_id, "category_id": category_of_label[label], "bbox": bbox, "score": score}
            results.append(entry)
    return results


def evaluate_coco(
    ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], image_ids: Sequence[Any] | None = None
) -> dict[str, float | None]:
    """Average precision and recall of detections, as COCO defines them.

    Args:
        ground_truth: A data set in COCO's annotation format.
        results: Detections in COCO's results format; of each class at most 100 per image count.
        image_ids: The images to evaluate on. Default: all of ``ground_truth``.

    Returns:
        The figures of `METRICS`. None where the set holds no object of that size.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress with print
        truth: Any = COCO()  # its stubs know files only
        truth.dataset = ground_truth
        truth.createIndex()
        # loadRes refuses an empty list; an empty COCO object means the same.
        detections = truth.loadRes(list(results)) if results else COCO()
        evaluation = COCOeval(truth, detections, "bbox")
        evaluation.params.imgIds = sorted(truth.getImgIds() if image_ids is None else set(image_ids))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # pycocotools writes -1 where there is nothing to find.
    return {name: None if value < 0 else float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)}


def format_metric(value: float | None) -> str:
    """Three digits, or "n/a" for a figure that does not exist."""
    return "n/a" if value is None else f"{value:.3f}"


class CocoEvaluation(L.Callback):
    """Collects the detections of a validation epoch and logs their COCO figures as ``val/AP``, ``val/AP50``, ...

    The module's ``validation_step`` must return torchvision's detections of the batch. For one process; in a
    distributed run every process would see its own share of the images only.

    Args:
        ground_truth: The validation set in COCO's annotation format.
        category_of_label: Category id per label, see `coco_results`.
        results_file: Where to write the detections of the last validation epoch in COCO's results format.

    Attributes:
        metrics: The figures of the last validation epoch, over the images that it showed.
        results: Its detections.
    """

    def __init__(
        self,
        ground_truth: dict[str, Any],
        category_of_label: Sequence[int],
        results_file: str | Path | None = None,
    ) -> None:
        self.ground_truth = ground_truth
        self.category_of_label = tuple(category_of_label)
        self.results_file = None if results_file is None else Path(results_file)
        self.metrics: dict[str, float | None] = {}
        self.results: list[dict[str, Any]] = []
        self._image_ids: list[Any] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the last epoch's detections."""
        self.results, self._image_ids = [], []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the batch's detections."""
        image_ids = [target["image_id"] for target in batch[1]]
        self.results += coco_results(outputs, image_ids, self.category_of_label)
        self._image_ids += image_ids

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Computes and logs the figures."""
        if trainer.sanity_checking:
            return
        # The images that were shown: with limit_val_batches the others would count as missed.
        self.metrics = evaluate_coco(self.ground_truth, self.results, self._image_ids)
        # A figure that does not exist is left out of the logs: a -1 would look like a measurement.
        figures = {f"val/{name}": torch.tensor(value) for name, value in self.metrics.items() if value is not None}
        for name, value in figures.items():
            pl_module.log(name, value, prog_bar=name in ("val/AP", "val/AP50"), batch_size=1)
        if self.results_file is not None:
            with written_whole(self.results_file) as partial:
                partial.write_text(json.dumps(self.results))
