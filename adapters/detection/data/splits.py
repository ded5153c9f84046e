"""Where the splits of a folder lie, in the layout of COCO or of Pascal VOC."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapters.detection.data.annotations import CocoAnnotations, DataError, find_splits, read_annotations
from adapters.detection.data.voc import find_voc_splits, is_voc, read_voc

__all__ = ["Split", "read_splits", "read_test_split"]


@dataclass(frozen=True)
class Split:
    """A part of a data set.

    Attributes:
        name: Its name, such as "train2017".
        annotations: What is known of its images.
        folder: Where the images lie.
    """

    name: str
    annotations: CocoAnnotations
    folder: Path


def read_splits(
    root: str | Path, train: str | None = None, val: str | None = None, *, skip_bad: bool = False
) -> tuple[Split, Split]:
    """Reads the splits for training and validation; the same twice if only one is there.

    Args:
        root: The folder: ``annotations/instances_<split>.json`` beside ``<split>/`` (COCO), or ``Annotations/``,
            ``ImageSets/Main/<split>.txt`` and ``JPEGImages/`` (Pascal VOC).
        train: Name of the split for training. Default: "train2017"; VOC: "train".
        val: Name of the split for validation. Default: "val2017"; VOC: "val", or "test".
        skip_bad: See `read_annotations`.

    Raises:
        DataError: Something is missing or unusable.
    """
    root = Path(root)
    if is_voc(root):
        default_train, default_val = find_voc_splits(root)
        names = train or default_train, val or default_val
        read = read_voc(root, names, skip_bad=skip_bad)
        folder = root / "JPEGImages"
        return Split(names[0], read[names[0]], folder), Split(names[1], read[names[1]], folder)
    if train is None or val is None:
        found = find_splits(root) if train is None and val is None else (train or val, val or train)
        train, val = train or found[0], val or found[1]
    assert train is not None and val is not None
    read = {
        name: read_annotations(root / "annotations" / f"instances_{name}.json", skip_bad=skip_bad)
        for name in dict.fromkeys((train, val))
    }
    return Split(train, read[train], root / train), Split(val, read[val], root / val)


def read_test_split(root: str | Path, name: str, *, skip_bad: bool = False) -> Split:
    """Reads a split without annotations, such as COCO's test-dev2017, whose images lie in test2017.

    Args:
        root: The folder.
        name: The split.
        skip_bad: See `read_annotations`.

    Raises:
        DataError: Something is missing or unusable.
    """
    root = Path(root)
    if is_voc(root):
        return Split(name, read_voc(root, (name,), skip_bad=skip_bad)[name], root / "JPEGImages")
    files = [root / "annotations" / f"{prefix}_{name}.json" for prefix in ("image_info", "instances")]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise DataError(f"annotation file not found: neither {files[0]} nor {files[1]} exists")
    folder = root / name
    if not folder.is_dir():
        folder = root / name.replace("-dev", "")
    return Split(name, read_annotations(file, annotated=False, skip_bad=skip_bad), folder)
