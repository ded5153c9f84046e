"""Annotation files in COCO's format, read and checked.

What is wrong with them is found before training starts: `DataError` names the file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["CocoAnnotations", "DataError", "find_splits", "merge_categories", "read_annotations"]

TRAIN_SPLIT, VAL_SPLIT = "train2017", "val2017"


class DataError(ValueError):
    """The data cannot be used. The message is one line that names the file."""


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
        skipped: What is wrong with every image entry that was left out, a line each.
    """

    path: Path
    images: list[dict[str, Any]]
    annotations: dict[Any, list[dict[str, Any]]]
    categories: dict[int, str]
    orphans: int = 0
    unknown: int = 0
    skipped: tuple[str, ...] = ()

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


def read_annotations(path: str | Path, *, skip_bad: bool = False, annotated: bool = True) -> CocoAnnotations:
    """Reads and checks a COCO annotation file.

    Args:
        path: The json file.
        skip_bad: Leave out and count annotations of a category that is not listed and images without a size, in place
            of an error.
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
    images, skipped = _with_size(path, images, skip_bad)
    by_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    unknown = 0
    for entry in entries:
        if not _is_id(entry["image_id"]):
            raise DataError(f"annotation file {path}: image_id {entry['image_id']!r} is not a number or a string")
        if not _is_id(entry["category_id"]) or entry["category_id"] not in categories:
            if skip_bad:
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
    return CocoAnnotations(path, images, by_image, dict(sorted(categories.items())), orphans, unknown, skipped)


def _with_size(
    path: Path, images: list[dict[str, Any]], skip_bad: bool
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The image entries that can be used, and what is wrong with the others."""
    good, faults = [], []
    for image in images:
        if not isinstance(image["file_name"], str):
            raise DataError(f"annotation file {path}: file_name {image['file_name']!r} is not a string")
        if _positive(image["width"]) and _positive(image["height"]):
            good.append(image)
        else:
            faults.append(f"annotation file {path}: image {image['file_name']} has no positive width and height")
    if faults and (not skip_bad or not good):
        raise DataError(faults[0])
    return good, tuple(faults)


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
