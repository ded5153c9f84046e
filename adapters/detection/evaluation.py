"""COCO average precision by pycocotools or faster-coco-eval, and the callback that collects what they need."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed
from torch import Tensor

from adapters.detection.files import written_whole

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""The twelve figures of COCO's summary, in its order; s, m, l stand for small, medium and large objects."""

BACKENDS = ("pycocotools", "faster_coco_eval")
"""Programs that compute them: COCO's own, and one in C++ with the same figures."""


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
        One entry per detection; boxes as [x, y, w, h]. Detections that are not finite are left out.
    """
    results = []
    for output, image_id in zip(outputs, image_ids, strict=True):
        boxes, scores, labels = (output[key].tolist() for key in ("boxes", "scores", "labels"))
        for (x1, y1, x2, y2), score, label in zip(boxes, scores, labels, strict=True):
            if label == 0:  # the background: category 0, if there is one, is another thing
                continue
            bbox = [x1, y1, x2 - x1, y2 - y1]
            if not all(map(math.isfinite, (*bbox, score))):  # json has no such numbers; such a box detects nothing
                continue
            entry = {"image_id": image_id, "category_id": category_of_label[label], "bbox": bbox, "score": score}
            results.append(entry)
    return results


def evaluate_coco(
    ground_truth: dict[str, Any],
    results: Sequence[dict[str, Any]],
    image_ids: Sequence[Any] | None = None,
    backend: str = "pycocotools",
) -> dict[str, float | None]:
    """Average precision and recall of detections, as COCO defines them.

    Args:
        ground_truth: A data set in COCO's annotation format.
        results: Detections in COCO's results format; of each class at most 100 per image count.
        image_ids: The images to evaluate on. Default: all of ``ground_truth``.
        backend: Who computes them, see `BACKENDS`.

    Returns:
        The figures of `METRICS`. None where the set holds no object of that size.

    Raises:
        ValueError: The backend is not known.
        ModuleNotFoundError: It is not installed.
    """
    COCO, COCOeval = _backend(backend)
    # By number: faster-coco-eval knows no others, and the ids of Pascal VOC are names.
    number = {image["id"]: i for i, image in enumerate(ground_truth["images"], 1)}
    ground_truth = ground_truth | {
        key: [entry | {name: number[entry[name]]} for entry in ground_truth[key]]
        for key, name in (("images", "id"), ("annotations", "image_id"))
    }
    results = [entry | {"image_id": number[entry["image_id"]]} for entry in results]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress with print
        truth: Any = COCO()  # its stubs know files only
        truth.dataset = {"info": {}} | ground_truth  # which loadRes looks for
        truth.createIndex()
        # loadRes refuses an empty list; an empty COCO object means the same.
        detections = truth.loadRes(results) if results else COCO()
        evaluation = COCOeval(truth, detections, "bbox")
        shown = number.values() if image_ids is None else {number[image_id] for image_id in image_ids}
        evaluation.params.imgIds = sorted(shown)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # pycocotools writes -1 where there is nothing to find.
    return {name: None if value < 0 else float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)}


def _backend(name: str) -> tuple[Any, Any]:
    """The classes for data and for evaluation, which have the same methods in both programs."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {list(BACKENDS)}")
    if name == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("backend 'faster_coco_eval' needs: pip install faster-coco-eval") from error
    return COCO, COCOeval_faster


def format_metric(value: float | None) -> str:
    """Three digits, or "n/a" for a figure that does not exist."""
    return "n/a" if value is None else f"{value:.3f}"


class CocoEvaluation(L.Callback):
    """Collects the detections of a validation epoch and logs their COCO figures as ``val/AP``, ``val/AP50``, ...

    The module's ``validation_step`` (``test_step``) must return torchvision's detections of the batch. In a distributed
    run the detections of all ranks are put together, and each image counts once. A test without ground truth, as on
    COCO's test-dev, has no figures; the results file is what its server wants.

    Args:
        ground_truth: The set in COCO's annotation format.
        category_of_label: Category id per label, see `coco_results`.
        results_file: Where to write the detections of the last epoch in COCO's results format.
        backend: Who computes the figures, see `BACKENDS`.

    Attributes:
        metrics: The figures of the last epoch, over the images that it showed.
        results: Its detections, of all ranks.
    """

    def __init__(
        self,
        ground_truth: dict[str, Any],
        category_of_label: Sequence[int],
        results_file: str | Path | None = None,
        backend: str = "pycocotools",
    ) -> None:
        _backend(backend)
        self.ground_truth = ground_truth
        self.category_of_label = tuple(category_of_label)
        self.results_file = None if results_file is None else Path(results_file)
        self.backend = backend
        self.metrics: dict[str, float | None] = {}
        self.results: list[dict[str, Any]] = []
        self._of_image: dict[Any, list[dict[str, Any]]] = {}

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the last epoch's detections."""
        self.results, self._of_image = [], {}

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
        for output, target in zip(outputs, batch[1], strict=True):
            image_id = target["image_id"]
            self._of_image[image_id] = coco_results([output], [image_id], self.category_of_label)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Computes and logs the figures."""
        if not trainer.sanity_checking:
            self._finish(trainer, pl_module, "val")

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Computes and logs the figures, where there is ground truth."""
        self._finish(trainer, pl_module, "test")

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        shares: list[Any] = [self._of_image]
        if trainer.world_size > 1:
            shares = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, self._of_image)
        of_image = {image_id: entries for share in shares for image_id, entries in share.items()}
        self.results = [entry for entries in of_image.values() for entry in entries]
        self.metrics = {}
        if self.ground_truth["annotations"]:
            # The images that were shown: with limit_val_batches the others would count as missed.
            self.metrics = evaluate_coco(self.ground_truth, self.results, list(of_image), self.backend)
        # A figure that does not exist is left out of the logs: a -1 would look like a measurement.
        figures = {f"{stage}/{name}": value for name, value in self.metrics.items() if value is not None}
        for name, value in figures.items():
            shown = name in (f"{stage}/AP", f"{stage}/AP50")
            # Every rank has the same figure: rank_zero_only would leave the others without one to choose the best by.
            pl_module.log(name, torch.tensor(value), prog_bar=shown, batch_size=1, sync_dist=False)
        if self.results_file is not None and trainer.is_global_zero:
            with written_whole(self.results_file) as partial:
                partial.write_text(json.dumps(self.results))
