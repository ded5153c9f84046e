"""Detections on images that are no data set."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.detection.evaluation import coco_results
from adapters.detection.files import written_whole
from adapters.detection.images import batched
from adapters.detection.necks import last_solution
from adapters.detection.training import DetectionModule, SolverSummary, Solves, summarize
from adapters.detection.visualize import draw_boxes

__all__ = ["PREDICTIONS", "class_names", "picture_names", "predict_images"]

PREDICTIONS = "predictions.json"
"""The file of the detections, in the folder of the pictures."""


def class_names(module: DetectionModule) -> tuple[list[str], list[int]]:
    """Name and category id of every label, the background's first, as the checkpoint remembers them.

    A detector that was trained without `CocoDataModule` knows numbers only.
    """
    categories = {int(key): str(name) for key, name in sorted(module.data.get("categories", {}).items())}
    if len(categories) != module.config.num_classes - 1:
        categories = {label: f"class {label}" for label in range(1, module.config.num_classes)}
    return ["background", *categories.values()], [0, *categories]


def picture_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A name for the picture of every image: its own, with a number where another has it already."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        name, number = f"{path.stem}.png", 1
        while name.lower() in taken:  # file systems may not tell A from a
            number += 1
            name = f"{path.stem}_{number}.png"
        taken.add(name.lower())
        names[path] = name
    return names


@torch.no_grad()
def predict_images(
    module: DetectionModule,
    images: Iterable[tuple[Path, Tensor]],
    out: Path,
    pictures: dict[Path, str],
    *,
    min_score: float = 0.3,
    batch_size: int = 1,
) -> tuple[list[dict[str, Any]], SolverSummary | None]:
    """Detects on images, draws the boxes into ``out`` and writes them to `PREDICTIONS` there.

    Entries are those of COCO's results format, with the running number of the image as its id, and beside it
    ``file_name``, the ``category``'s name and the ``picture``, if there is one.

    Args:
        module: The detector.
        images: Path and image, see `adapters.detection.images.read_images`.
        out: Folder to write to.
        pictures: File name of the picture to draw of an image; none is drawn of those without.
        min_score: Detections below this score are left out.
        batch_size: Images per forward pass. Those of a batch are padded to a common size.

    Returns:
        The entries; and how the fixed points converged, None without an implicit neck.
    """
    model, device = module.model.eval(), module.device
    names, categories = class_names(module)
    entries: list[dict[str, Any]] = []
    solves: list[Solves] = []
    number = 0
    for paths, group in batched(images, batch_size):
        outputs = model([image.to(device) for image in group])
        solution = last_solution(module.neck)
        if solution is not None:
            solves.append(Solves.of(solution))
        for path, image, output in zip(paths, group, outputs, strict=True):
            number += 1
            kept = output["scores"] >= min_score
            found = {key: output[key][kept].cpu() for key in ("boxes", "labels", "scores")}
            about: dict[str, Any] = {"file_name": str(path)}
            if path in pictures:
                draw_boxes(
                    out / pictures[path], image, found["boxes"], found["labels"], found["scores"], class_names=names
                )
                about["picture"] = pictures[path]
            for entry in coco_results([found], [number], categories):
                name = names[categories.index(entry["category_id"], 1)]
                entries.append(entry | {"category": name} | about)
    with written_whole(out / PREDICTIONS) as partial:
        partial.write_text("[" + ",\n".join(map(json.dumps, entries)) + "]\n")
    return entries, summarize(solves) if solves else None
