"""Detection sets in the layout of Pascal VOC, read into the form of COCO's.

The layout is ``Annotations/<id>.xml`` and ``ImageSets/Main/<split>.txt`` beside ``JPEGImages/``. A corner in VOC is the
number of a pixel, counted from 1, and belongs to the box: (xmin, ymin) becomes (xmin - 1, ymin - 1), and (xmax, ymax)
stays, the right border of its pixel. Objects marked difficult count as COCO's crowd: they are neither trained on nor
missed by the evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from adapters.detection.data.annotations import CocoAnnotations, DataError

__all__ = ["VOC_CLASSES", "find_voc_splits", "is_voc", "read_voc"]

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The classes of Pascal VOC: their ids are those of this order whatever classes a split shows."""


def is_voc(root: str | Path) -> bool:
    """Whether the folder has the layout of Pascal VOC."""
    return (Path(root) / "ImageSets" / "Main").is_dir()


def find_voc_splits(root: str | Path) -> tuple[str, str]:
    """The names of the splits for training and validation; the same twice if only one is there.

    Raises:
        DataError: None is there.
    """
    lists = Path(root) / "ImageSets" / "Main"
    train = [name for name in ("train", "trainval") if (lists / f"{name}.txt").exists()]
    val = [name for name in ("val", "test") if (lists / f"{name}.txt").exists()]
    if not train and not val:
        raise DataError(f"no split found: {lists} has none of train.txt, trainval.txt, val.txt, test.txt")
    return (train or val)[0], (val or train)[0]


def read_voc(root: str | Path, splits: Sequence[str], *, skip_bad: bool = False) -> dict[str, CocoAnnotations]:
    """Reads and checks splits of a set in the layout of Pascal VOC.

    Args:
        root: The folder.
        splits: Names of the splits, which share their categories: VOC's own twenty, or else all classes that the
            splits show, in alphabetical order.
        skip_bad: Leave out and count images whose annotation cannot be used, in place of an error.

    Returns:
        The annotations per split. The id of an image is its name in the list.

    Raises:
        DataError: A file is missing, is not xml, or lacks what a detection set needs.
    """
    root = Path(root)
    parsed, skipped = {}, {}
    for split in dict.fromkeys(splits):
        parsed[split], skipped[split] = _parse_all(root, _listed(root, split), skip_bad)
    seen = sorted({obj["name"] for images in parsed.values() for _, objects in images for obj in objects})
    if not seen:
        raise DataError(f"{root / 'Annotations'} has no object in the split {' or '.join(parsed)}")
    classes = VOC_CLASSES if set(seen) <= set(VOC_CLASSES) else seen
    categories = {i + 1: name for i, name in enumerate(classes)}
    id_of = {name: i for i, name in categories.items()}
    read = {}
    for split, images in parsed.items():
        by_image = {
            image["id"]: [
                {k: v for k, v in obj.items() if k != "name"}
                | {"image_id": image["id"], "category_id": id_of[obj["name"]]}
                for obj in objects
            ]
            for image, objects in images
        }
        entries = [image for image, _ in images]
        path = root / "ImageSets" / "Main" / f"{split}.txt"
        read[split] = CocoAnnotations(path, entries, by_image, categories, skipped=skipped[split])
    return read


def _listed(root: Path, split: str) -> list[str]:
    """Names of a split's images; the lists of single classes have a second column, -1 for an image without any."""
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise DataError(f"list of images not found: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list of images {path}: {error}") from None
    names = [columns[0] for columns in lines]
    if not names:
        raise DataError(f"list of images {path} is empty")
    if len(set(names)) < len(names):
        raise DataError(f"list of images {path} names an image twice")
    return names


def _parse_all(root: Path, names: Sequence[str], skip_bad: bool) -> tuple[list[Any], tuple[str, ...]]:
    """Entry and objects of every image that can be used, and what is wrong with the others."""
    parsed, faults = [], []
    for name in names:
        try:
            parsed.append(_parse(root, name))
        except DataError as error:
            if not skip_bad:
                raise
            faults.append(str(error))
    if not parsed:
        raise DataError(f"no annotation can be used; the first: {faults[0]}")
    return parsed, tuple(faults)


def _parse(root: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The entry of an image, and its objects with the names of their classes."""
    path = root / "Annotations" / f"{name}.xml"
    try:
        tree = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise DataError(f"annotation file not found: {path}") from None
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"annotation file {path} is not valid xml: {error}") from None
    width, height = (_number(path, tree, f"size/{side}") for side in ("width", "height"))
    if width <= 0 or height <= 0:
        raise DataError(f"annotation file {path} gives no positive width and height")
    image = {
        "id": name,
        "file_name": _image_file(root, name, (tree.findtext("filename") or "").strip()),
        "width": int(width),
        "height": int(height),
    }
    objects = []
    for node in tree.iter("object"):
        label = (node.findtext("name") or "").strip()
        if not label:
            raise DataError(f"annotation file {path} has an object without a name")
        x1, y1, x2, y2 = (_number(path, node, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax"))
        difficult = (node.findtext("difficult") or "0").strip() == "1"
        box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
        objects.append({"name": label, "bbox": box, "area": max(box[2], 0) * max(box[3], 0), "iscrowd": int(difficult)})
    return image, objects


def _image_file(root: Path, name: str, given: str) -> str:
    """The file of an image: of its name, as in VOC; many tools write a path or another name into the annotation."""
    candidates = [f"{name}.jpg", given, *(f"{name}{suffix}" for suffix in (".jpeg", ".png", ".JPG", ".JPEG", ".PNG"))]
    return next(
        (file for file in candidates if file and (root / "JPEGImages" / file).is_file()), given or candidates[0]
    )


def _number(path: Path, node: ElementTree.Element, name: str) -> float:
    text = node.findtext(name)
    try:
        return float(text or "")
    except ValueError:
        raise DataError(f"annotation file {path}: {name} is {text!r}, not a number") from None
