"""The image files of a detection set: decoded once before the training, and read as RGB."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from adapters.detection.data.annotations import CocoAnnotations, DataError

__all__ = ["find_bad_images", "has_32_bit_pixels", "is_too_thin", "to_rgb", "verify_images"]

_EXIF_ORIENTATION = 0x0112


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


def is_too_thin(width: float, height: float, longest_side: float) -> bool:
    """Whether nothing is left of the shorter side of an image whose longer side is resized to ``longest_side``."""
    short, long = sorted((width, height))
    return short * longest_side < long
