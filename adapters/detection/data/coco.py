"""Detection sets in the COCO-2017 layout: read, check and serve them.

The layout is ``ROOT/annotations/instances_<split>.json`` beside the image folders ``ROOT/<split>/``. Any set written
that way will do; category ids may be sparse (COCO's own run from 1 to 90 with gaps) and become the labels 1..K of
torchvision, where 0 is the background.

What is wrong with the data is found before training starts: `DataError` names the file. What is merely untidy (boxes
without area, boxes that leave the image) is repaired for training, counted in `BoxReport` and left as it is for the
evaluation, so that figures stay comparable with other programs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm.auto import tqdm

from adapters.detection.data.order import seed_of

TRAIN_SPLIT, VAL_SPLIT = "train2017", "val2017"
MIN_SIDE = 1e-3  # pixels; a clipped box below it is degenerate
_EXIF_ORIENTATION = 0x0112


class DataError(ValueError):
    """The data cannot be used. The message is one line that names the file."""


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


@dataclass(frozen=True)
class CocoAnnotations:
    """The content of one annotation file, checked.

    Attributes:
        path: The file.
        images: Image entries, in the order of the file.
        annotations: Annotation entries per image id.
        categories: Name per category id, by ascending id.
        orphans: Annotations of images that are not listed.
        unknown: Annotations of categories that are not listed.
    """

    path: Path
    images: list[dict[str, Any]]
    annotations: dict[Any, list[dict[str, Any]]]
    categories: dict[int, str]
    orphans: int = 0
    unknown: int = 0

    def head(self, count: int | None) -> CocoAnnotations:
        """The same with the first ``count`` images only (None: all)."""
        if count is None or count >= len(self.images):
            return self
        return self._only(self.images[:count])

    def without(self, ids: Collection[Any]) -> CocoAnnotations:
        """The same without the images of these ids."""
        return self._only([image for image in self.images if image["id"] not in ids])

    def _only(self, images: list[dict[str, Any]]) -> CocoAnnotations:
        return replace(
            self, images=images, annotations={image["id"]: self.annotations[image["id"]] for image in images}
        )


def read_annotations(path: str | Path, *, skip_unknown: bool = False, annotated: bool = True) -> CocoAnnotations:
    """Reads and checks a COCO annotation file.

    Args:
        path: The json file.
        skip_unknown: Leave out and count annotations of a category that is not listed, in place of an error.
        annotated: Whether the file must have annotations; those of test sets list images and categories alone.

    Returns:
        Its content.

    Raises:
        DataError: The file is missing, is not json, or lacks what a detection set needs.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"annotation file not found: {path}") from None
    except OSError as error:
        raise DataError(f"cannot read annotation file {path}: {error.strerror}") from None
    except ValueError as error:  # covers undecodable bytes as well
        raise DataError(f"annotation file {path} is not valid json: {error}") from None
    images = _entries(path, content, "images", ("id", "file_name", "width", "height"))
    if not annotated and isinstance(content, dict):
        content.setdefault("annotations", [])
    entries = _entries(path, content, "annotations", ("image_id", "category_id", "bbox"))
    category_entries = _entries(path, content, "categories", ("id", "name"))
    _check_ids(path, "images", images)
    _check_ids(path, "categories", category_entries)
    categories = {c["id"]: str(c["name"]) for c in category_entries}
    if not images or not categories:
        raise DataError(f"annotation file {path} lists no {'categories' if images else 'images'}")
    by_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    for image in images:
        if not isinstance(image["file_name"], str):
            raise DataError(f"annotation file {path}: file_name {image['file_name']!r} is not a string")
        if not _positive(image["width"]) or not _positive(image["height"]):
            raise DataError(f"annotation file {path}: image {image['file_name']} has no positive width and height")
    unknown = 0
    for entry in entries:
        if not _is_id(entry["image_id"]):
            raise DataError(f"annotation file {path}: image_id {entry['image_id']!r} is not a number or a string")
        if not _is_id(entry["category_id"]) or entry["category_id"] not in categories:
            if skip_unknown:
                unknown += 1
                continue
            raise DataError(f"annotation file {path}: category_id {entry['category_id']!r} is not in its categories")
        for name in ("area", "iscrowd"):
            if not isinstance(entry.get(name), int | float | None):
                raise DataError(f"annotation file {path}: {name} {entry[name]!r} is not a number")
        if not _is_box(entry["bbox"]):
            raise DataError(f"annotation file {path}: bbox {entry['bbox']!r} is not a list of four numbers")
        by_image.get(entry["image_id"], []).append(entry)
    orphans = sum(entry["image_id"] not in by_image for entry in entries)
    return CocoAnnotations(path, images, by_image, dict(sorted(categories.items())), orphans, unknown)


def _entries(path: Path, content: Any, key: str, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The list under ``key``, whose entries must be dicts that have the ``needed`` keys."""
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise DataError(f"annotation file {path} has no list {key!r}: not in COCO's detection format")
    for i, entry in enumerate(entries):
        missing = [name for name in needed if not isinstance(entry, dict) or name not in entry]
        if missing:
            raise DataError(f"annotation file {path}: {key}[{i}] has no {missing[0]!r}")
    return entries


def _is_id(value: Any) -> bool:
    return isinstance(value, int | float | str)


def _check_ids(path: Path, key: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """Ids must be all numbers or all strings, because pycocotools sorts them, and each belongs to one entry."""
    ids = [entry["id"] for entry in entries]
    odd = next((value for value in ids if not _is_id(value) or isinstance(value, str) != isinstance(ids[0], str)), None)
    if odd is not None or None in ids:
        raise DataError(f"annotation file {path}: id {odd!r} in {key}: ids must be all numbers or all strings")
    if len(set(ids)) < len(ids):
        raise DataError(f"annotation file {path} gives the same id to several {key}")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) or v is None for v in box)


def merge_categories(*files: CocoAnnotations) -> dict[int, str]:
    """The categories of all files, by ascending id.

    Raises:
        DataError: Two files give different names to one id.
    """
    merged: dict[int, str] = {}
    for file in files:
        for key, name in file.categories.items():
            if merged.setdefault(key, name) != name:
                raise DataError(f"annotation file {file.path} calls category {key} {name!r}, not {merged[key]!r}")
    return dict(sorted(merged.items()))


def find_splits(root: str | Path) -> tuple[str, str]:
    """The names of the train and the val split in ``root``; the same twice if only one is there.

    Raises:
        DataError: The folder does not exist or holds neither split.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"data folder not found: {root}")
    files = {split: root / "annotations" / f"instances_{split}.json" for split in (TRAIN_SPLIT, VAL_SPLIT)}
    found = [split for split, file in files.items() if file.exists()]
    if not found:
        wanted = " nor ".join(str(file) for file in files.values())
        raise DataError(f"annotation file not found: neither {wanted} exists (COCO-2017 layout)")
    return found[0], found[-1]


def verify_images(annotations: CocoAnnotations, folder: str | Path, *, progress: bool = True) -> None:
    """Opens and decodes every listed image, so that a bad one is found now and not an hour into the training.

    Args:
        annotations: The images to look for.
        folder: Where they lie.
        progress: Whether to show a progress bar.

    Raises:
        DataError: An image is missing, unreadable, truncated, or not of the size that the annotation file gives.
    """
    found = list(find_bad_images(annotations, folder, progress=progress).values())
    if found:
        more = f" (and {len(found) - 1} more such images)" if len(found) > 1 else ""
        raise DataError(found[0] + more)


def find_bad_images(annotations: CocoAnnotations, folder: str | Path, *, progress: bool = True) -> dict[Any, str]:
    """What is wrong with images that cannot be used, in a line each, by image id; see `verify_images`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"image folder not found: {folder}")
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        faults = pool.map(lambda image: _image_fault(folder, image), annotations.images)
        bar = tqdm(faults, f"checking {folder.name}", len(annotations.images), unit="img", disable=not progress)
        return {image["id"]: fault for image, fault in zip(annotations.images, bar, strict=True) if fault}


def _image_fault(folder: Path, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with one image, in one line; None for a good one."""
    path = folder / str(entry["file_name"])
    try:
        with Image.open(path) as image:
            size, mode = image.size, image.mode
            turned = size != (entry["width"], entry["height"]) and image.getexif().get(_EXIF_ORIENTATION, 1) >= 5
            if has_32_bit_pixels(image):
                return f"image {path} has 32-bit pixels (mode {mode}): only 8-bit and 16-bit images can be read"
            image.draft("RGB", (1, 1))  # JPEG only: reads all the data but reconstructs an eighth of the pixels
            image.load()
    except FileNotFoundError:
        return f"image listed in the annotations but missing: {path}"
    except UnidentifiedImageError:
        return f"not a readable image: {path}"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"unreadable image {path}: {error}"
    if size != (entry["width"], entry["height"]):
        note = " (it is turned by its EXIF tag; boxes must be those of the pixels as stored)" if turned else ""
        return f"image {path} is {size[0]}x{size[1]}, its annotation says {entry['width']}x{entry['height']}{note}"
    return None


def has_32_bit_pixels(image: Image.Image) -> bool:
    """Whether the range of the pixels is anybody's guess."""
    return image.mode == "F" or (image.mode == "I" and not _is_16_bit(image))


def _is_16_bit(image: Image.Image) -> bool:
    """Whether the pixels run to 65535. Pillow calls 16-bit PNGs "I" in some versions."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB; `Image.convert` alone would cut 16-bit pixels at 255, to a white picture."""
    if _is_16_bit(image):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    return image.convert("RGB")


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
