"""Detection sets in the COCO-2017 layout, served to torchvision's detectors.

The layout is ``ROOT/annotations/instances_<split>.json`` beside the image folders ``ROOT/<split>/``. Any set written
that way will do; category ids may be sparse (COCO's own run from 1 to 90 with gaps) and become the labels 1..K of
torchvision, where 0 is the background.

What is merely untidy (boxes without area, boxes that leave the image) is repaired for training, counted in `BoxReport`
and left as it is for the evaluation, so that figures stay comparable with other programs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from adapters.detection.data.annotations import CocoAnnotations, DataError
from adapters.detection.data.image_files import to_rgb
from adapters.detection.data.order import seed_of

__all__ = ["BoxReport", "CocoDetection"]

MIN_SIDE = 1e-3  # pixels; a clipped box below it is degenerate


@dataclass
class BoxReport:
    """How many of a split's annotations are used for training, and what became of the others.

    Attributes:
        used: boxes trained on, the clipped ones included.
        clipped: boxes that left the image and were cut at its border.
        degenerate: boxes skipped because they are not finite, have no area, or lie outside the image.
        crowd: ``iscrowd`` boxes, which are not trained on and count as "ignore" in the evaluation.
        orphans: annotations of images that are not in the list.
        unknown: annotations of a category that is not in the list, where these are skipped.
        empty_images: images without any box to train on; they are kept, as negatives.
    """

    used: int = 0
    clipped: int = 0
    degenerate: int = 0
    crowd: int = 0
    orphans: int = 0
    unknown: int = 0
    empty_images: int = 0

    def __str__(self) -> str:
        parts = [f"{self.used} boxes"]
        for count, what in (
            (self.clipped, "clipped at the border"),
            (self.degenerate, "degenerate and skipped"),
            (self.crowd, "crowd (not trained on)"),
            (self.orphans, "of unlisted images, ignored"),
            (self.unknown, "of unknown categories, ignored"),
        ):
            parts += [f"{count} {what}"] if count else []
        if self.empty_images:
            parts.append(f"{self.empty_images} images without objects")
        return ", ".join(parts)


class CocoDetection(Dataset):
    """Images with boxes for torchvision's detectors.

    An item is ``(image, target)``: the image a float tensor (3, H, W) in 0..1, the target a dict of ``boxes``
    (N, 4) as x1, y1, x2, y2 in pixels, ``labels`` (N,) in 1..K, and ``image_id``.

    Args:
        annotations: Checked annotations, see `read_annotations`.
        folder: Folder of the images.
        categories: Name per category id; label i is the i-th id in ascending order. Default: the file's own.
        transforms: A torchvision v2 transform of image and target.

    Attributes:
        class_names: Name of every label, "background" first.
        box_report: What became of the annotations.
        seed: Where the draws of ``transforms`` for an image start from, together with its index. None: they come from
            the global random numbers.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        folder: str | Path,
        *,
        categories: Mapping[int, str] | None = None,
        transforms: Any = None,
    ) -> None:
        self.annotations = annotations
        self.folder = Path(folder)
        self.categories = dict(sorted((categories or annotations.categories).items()))
        self.category_of_label = (0, *self.categories)  # 0: the background, which is no category
        self.label_of_category = {category: label + 1 for label, category in enumerate(self.categories)}
        self.class_names = ("background", *self.categories.values())
        self.transforms = transforms
        self.box_report = BoxReport(orphans=annotations.orphans, unknown=annotations.unknown)
        self.seed: int | None = None
        self._targets = [self._read_target(image) for image in annotations.images]

    @property
    def num_classes(self) -> int:
        """Number of labels, the background included, as torchvision's detectors count."""
        return len(self.class_names)

    def without(self, ids: Collection[Any]) -> CocoDetection:
        """The same without the images of these ids."""
        left = self.annotations.without(ids)
        return CocoDetection(left, self.folder, categories=self.categories, transforms=self.transforms)

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        entry = self.annotations.images[index]
        path = self.folder / entry["file_name"]
        try:
            with Image.open(path) as file:
                image = tv_tensors.Image(v2.functional.pil_to_tensor(to_rgb(file)))
        except OSError as error:
            raise DataError(f"unreadable image {path}: {error}") from None
        boxes, labels = self._targets[index]
        frame = (entry["height"], entry["width"])
        boxes = tv_tensors.BoundingBoxes(boxes.clone(), format="XYXY", canvas_size=frame)  # type: ignore[call-overload]
        target = {"boxes": boxes, "labels": labels.clone(), "image_id": entry["id"]}
        if self.transforms is not None:
            with torch.random.fork_rng(devices=[], enabled=self.seed is not None):
                if self.seed is not None:
                    torch.manual_seed(seed_of(self.seed, index))
                image, target = self.transforms(image, target)
        target["boxes"] = target["boxes"].as_subclass(Tensor)
        return v2.functional.to_dtype(image, torch.float32, scale=True).as_subclass(Tensor), target

    def boxes(self, index: int) -> Tensor:
        """The boxes of an image that are trained on, (N, 4), without reading the image."""
        return self._targets[index][0]

    def ground_truth(self) -> dict[str, Any]:
        """The split in COCO's format for the evaluation: boxes as they are in the file, crowd boxes included.

        Boxes without area stay, because pycocotools counts them as missed; those that are not finite are left out, and
        an area that is missing or no size becomes that of the box.
        """
        entries = []
        for image in self.annotations.images:
            for entry in self.annotations.annotations[image["id"]]:
                x, y, w, h = (float("nan") if v is None else float(v) for v in entry["bbox"])
                if not all(map(math.isfinite, (x, y, w, h))):
                    continue
                # Ids are given anew: pycocotools takes a match with id 0 for none, and some files have no ids.
                new = {"id": len(entries) + 1, "iscrowd": int(entry.get("iscrowd") or 0), "bbox": [x, y, w, h]}
                area = float("nan") if entry.get("area") is None else float(entry["area"])
                known = math.isfinite(area) and area >= 0
                new["area"] = area if known else max(w, 0.0) * max(h, 0.0)
                entries.append(new | {key: entry[key] for key in ("image_id", "category_id")})
        categories = [{"id": key, "name": name} for key, name in self.categories.items()]
        return {"info": {}, "images": self.annotations.images, "annotations": entries, "categories": categories}

    def _read_target(self, image: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        report, boxes, labels = self.box_report, [], []
        for entry in self.annotations.annotations[image["id"]]:
            if entry.get("iscrowd", 0):
                report.crowd += 1
                continue
            box, clipped = _clip(entry["bbox"], image["width"], image["height"])
            if box is None:
                report.degenerate += 1
                continue
            report.clipped += clipped
            boxes.append(box)
            labels.append(self.label_of_category[entry["category_id"]])
        report.used += len(boxes)
        report.empty_images += not boxes
        return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(labels, dtype=torch.int64)


def _clip(box: Sequence[float | None], width: float, height: float) -> tuple[list[float] | None, bool]:
    """A COCO box [x, y, w, h] as corners inside the image (None if nothing is left), and whether it was cut."""
    x, y, w, h = (float("nan") if v is None else float(v) for v in box)
    if not all(map(math.isfinite, (x, y, w, h))) or w <= 0 or h <= 0:
        return None, False
    corners = [max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))]
    if corners[2] - corners[0] < MIN_SIDE or corners[3] - corners[1] < MIN_SIDE:
        return None, False
    # A file that rounds to two digits may put a corner a hundredth of a pixel outside: not worth reporting.
    cut = max(-x, -y, x + w - width, y + h - height) > 0.02
    return corners, cut
