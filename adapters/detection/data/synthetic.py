"""A detection data set drawn by a program: shapes on textured backgrounds, written in the COCO-2017 layout.

It lets every example and test run without a download: four classes, occlusion, and objects of the three sizes for
which COCO reports an AP of its own (area below 32^2, up to 96^2 and above, in pixels). A detector that starts from
random weights has to learn it within minutes on a CPU, so a shape's hue is a strong hint at its class: every class has
a band of hues of its own, and the background is pale.

Boxes are tight around the *visible* pixels and ``area`` is the number of visible pixels, as in COCO's own masks.
"""

from __future__ import annotations

import colorsys
import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

CLASS_NAMES = ("circle", "square", "triangle", "cross")

# Side of the square whose area an object has, in pixels. The limits stay clear of COCO's 32 and 96, so that a little
# occlusion does not move every object into the next class.
SIZE_RANGES = {"small": (26.0, 31.0), "medium": (50.0, 62.0), "large": (101.0, 122.0)}
SIZE_WEIGHTS = {"small": 0.3, "medium": 0.45, "large": 0.25}
MIN_VISIBLE = 0.6  # an object may lose up to 40% of its pixels to objects drawn over it
SUPERSAMPLE = 3
MAX_ANGLE = math.radians(12)  # of a shape's rotation
BACKGROUND_SATURATION = 0.3  # of the colour noise behind the shapes
HUE_SPREAD = 0.35  # half the width of a class's band of hues, in distances between two classes
MANIFEST = "synthetic.json"
CONTENTS = {"annotations", "train2017", "val2017", MANIFEST}  # of a set's folder


@dataclass(frozen=True)
class SyntheticSettings:
    """What determines a synthetic data set, to the last pixel.

    Attributes:
        train_images: Images in ``train2017``.
        val_images: Images in ``val2017``.
        image_size: Side of the square images, in pixels. Below about 140 no object is large in COCO's sense.
        max_objects: Objects per image are drawn from 1 to this number; one image in 25 stays empty.
        seed: Seed of the generator; image ``i`` of a split depends on the seed, the split and ``i`` only.
    """

    train_images: int = 800
    val_images: int = 120
    image_size: int = 192
    max_objects: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train_images", "val_images", "max_objects"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size < 48:
            raise ValueError(f"image_size must be at least 48 pixels, got {self.image_size}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


def generate_dataset(root: str | Path, settings: SyntheticSettings, *, progress: bool = True) -> Path:
    """Writes a train and a val split below ``root`` in the COCO-2017 layout.

    The set is written beside ``root`` first and moved there when complete: an interrupted call leaves nothing that
    looks like a data set. A complete set made with the same settings is kept as it is.

    Args:
        root: Folder to create, with ``annotations``, ``train2017`` and ``val2017`` in it.
        settings: What to draw.
        progress: Whether to show a progress bar.

    Returns:
        ``root`` as a path.

    Raises:
        FileExistsError: ``root`` exists and is not a set made with these settings, or something else has the name
            ``root`` + ".partial".
    """
    root = Path(root)
    if root.exists():
        if _read_manifest(root) == asdict(settings):
            return root
        raise FileExistsError(f"{root} exists and does not hold the synthetic set asked for")
    partial = root.with_name(root.name + ".partial")
    if partial.exists():  # of an interrupted call, or somebody else's
        if not partial.is_dir() or {path.name for path in partial.iterdir()} - CONTENTS:
            raise FileExistsError(f"{partial} is in the way: it is no unfinished synthetic set")
        shutil.rmtree(partial)
    (partial / "annotations").mkdir(parents=True)
    total = settings.train_images + settings.val_images
    with tqdm(total=total, desc="drawing images", unit="img", disable=not progress) as bar:
        for stream, (split, count) in enumerate(
            (("train2017", settings.train_images), ("val2017", settings.val_images))
        ):
            (partial / split).mkdir()
            annotations = _write_split(partial / split, count, stream, settings, bar)
            (partial / "annotations" / f"instances_{split}.json").write_text(json.dumps(annotations))
    (partial / MANIFEST).write_text(json.dumps(asdict(settings), indent=2))
    partial.rename(root)
    return root


def _read_manifest(root: Path) -> dict | None:
    try:
        return json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError):
        return None


def _write_split(folder: Path, count: int, stream: int, settings: SyntheticSettings, bar: tqdm) -> dict:
    """Draws ``count`` images into ``folder`` and returns their COCO annotations."""
    images, annotations = [], []
    for i in range(count):
        rng = np.random.default_rng((settings.seed, stream, i))
        pixels, objects = draw_scene(rng, settings.image_size, settings.max_objects, empty=i % 25 == 24)
        name = f"{i + 1:012d}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=92)
        size = settings.image_size
        images.append({"id": i + 1, "file_name": name, "width": size, "height": size})
        for label, box, area in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": label + 1,
                    "bbox": box,
                    "area": area,
                    "iscrowd": 0,
                }
            )
        bar.update()
    categories = [{"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASS_NAMES)]
    info = {"description": "synthetic shapes", "settings": asdict(settings)}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def draw_scene(
    rng: np.random.Generator, size: int, max_objects: int, *, empty: bool = False
) -> tuple[np.ndarray, list[tuple[int, list[float], int]]]:
    """Draws one image.

    Args:
        rng: Source of all randomness.
        size: Side of the image, in pixels.
        max_objects: Upper limit of the number of objects.
        empty: Draw the background only.

    Returns:
        The image, ``(size, size, 3)`` uint8, and per object its class index, its box ``[x, y, w, h]`` in pixels and
        its visible area in pixels.
    """
    image = _background(rng, size)
    wanted = 0 if empty else int(rng.integers(1, max_objects + 1))
    # Large objects come first: painted last they would hide the small ones.
    areas = sorted((_target_side(rng, size) for _ in range(wanted)), reverse=True)
    owner = np.full((size, size), -1)
    labels: list[int] = []
    placed = np.zeros(0, dtype=np.int64)  # full area of each placed object
    for side in areas:
        label = int(rng.integers(len(CLASS_NAMES)))
        for _ in range(12):  # a place where it hides no other object too much may not exist
            mask = _shape_mask(rng, label, side, size)
            solid = mask > 0.5
            left = np.bincount(owner[(owner >= 0) & ~solid], minlength=len(labels))
            if solid.sum() >= 25 and np.all(left >= MIN_VISIBLE * placed):
                _paint(rng, image, mask, label)
                owner[solid] = len(labels)
                labels.append(label)
                placed = np.append(placed, solid.sum())
                break
    objects = [(label, *_tight_box(owner == i)) for i, label in enumerate(labels)]
    image += rng.normal(0.0, 0.015, image.shape)  # sensor noise
    return (image.clip(0.0, 1.0) * 255).round().astype(np.uint8), objects


def _target_side(rng: np.random.Generator, size: int) -> float:
    """Draws the square root of an object's area; size classes that do not fit the image are left out."""
    names = [name for name, (low, _) in SIZE_RANGES.items() if low <= 0.68 * size]
    weights = np.array([SIZE_WEIGHTS[name] for name in names])
    low, high = SIZE_RANGES[names[int(rng.choice(len(names), p=weights / weights.sum()))]]
    return float(rng.uniform(low, min(high, 0.68 * size)))


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth colour noise of a few scales with a stripe pattern over it, ``(size, size, 3)`` in 0..1."""
    image = np.zeros((size, size, 3))
    for cells, weight in ((3, 0.5), (9, 0.25), (36, 0.15)):
        noise = (rng.random((cells, cells, 3)) * 255).astype(np.uint8)
        smooth = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
        image += weight * np.asarray(smooth) / 255.0
    y, x = np.mgrid[0:size, 0:size] / size
    angle, frequency = rng.uniform(0, math.pi), rng.uniform(4, 24)
    stripes = np.sin(2 * math.pi * frequency * (x * math.cos(angle) + y * math.sin(angle)))
    pale = image.mean(axis=2, keepdims=True) + BACKGROUND_SATURATION * (image - image.mean(axis=2, keepdims=True))
    return pale + rng.uniform(0.0, 0.08) * stripes[..., None]


def _paint(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, label: int) -> None:
    """Blends a shape of one shaded colour, with a hue of its class, into ``image``."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    patch, cover = image[window], mask[window]
    hue = (label + rng.uniform(-HUE_SPREAD, HUE_SPREAD)) / len(CLASS_NAMES)
    colour = np.array(colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(0.7, 1.0), rng.uniform(0.6, 1.0)))
    slope_y, slope_x = rng.uniform(-0.25, 0.25, 2)
    shade = slope_y * np.linspace(-0.5, 0.5, len(patch))[:, None] + slope_x * np.linspace(-0.5, 0.5, patch.shape[1])
    patch += cover[..., None] * (colour + shade[..., None] - patch)


def _tight_box(visible: np.ndarray) -> tuple[list[float], int]:
    """Box ``[x, y, w, h]`` and area of a boolean mask that has at least one pixel."""
    columns, rows = np.flatnonzero(visible.any(axis=0)), np.flatnonzero(visible.any(axis=1))
    x, y = int(columns[0]), int(rows[0])
    box = [float(x), float(y), float(columns[-1] + 1 - x), float(rows[-1] + 1 - y)]
    return box, int(visible.sum())


def _shape_mask(rng: np.random.Generator, label: int, side: float, size: int) -> np.ndarray:
    """Coverage in 0..1 of a shape with area ``side**2`` at a random place and angle inside the image."""
    outline = _outline(rng, CLASS_NAMES[label])
    scale = side / math.sqrt(_area(outline))
    angle = rng.uniform(-MAX_ANGLE, MAX_ANGLE)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    outline = scale * outline @ rotation.T
    low, high = outline.min(axis=0), outline.max(axis=0)
    room = size - 2 - (high - low)
    if room.min() < 0:  # at an unlucky angle a thin shape is longer than the image
        shrink = (size - 2) / (high - low).max()
        outline, low, room = shrink * outline, shrink * low, size - 2 - shrink * (high - low)
    offset = 1 - low + rng.random(2) * room
    canvas = Image.new("L", (size * SUPERSAMPLE, size * SUPERSAMPLE))
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in (outline + offset) * SUPERSAMPLE], fill=255)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX)) / 255.0


def _area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))


def _circle(radius: float, points: int = 64) -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, points, endpoint=False)
    return radius * np.stack([np.cos(t), np.sin(t)], axis=1)


def _outline(rng: np.random.Generator, name: str) -> np.ndarray:
    """Outline of a shape around the origin, with some variation of its proportions."""
    stretch = np.array([1.0, rng.uniform(0.85, 1.0)])
    if name == "circle":
        return _circle(1.0) * stretch
    if name == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * stretch
    if name == "triangle":
        return _circle(1.0, 3) * stretch
    w = rng.uniform(0.3, 0.4)  # half the width of the cross's arms
    corners = [
        (w, w),
        (w, 1),
        (-w, 1),
        (-w, w),
        (-1, w),
        (-1, -w),
        (-w, -w),
        (-w, -1),
        (w, -1),
        (w, -w),
        (1, -w),
        (1, w),
    ]
    return np.array(corners, dtype=float)
