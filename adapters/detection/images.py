"""Images that are no data set: files and folders named by a user, read one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional
from tqdm.auto import tqdm

from adapters.detection.data import DataError
from adapters.detection.data.image_files import has_32_bit_pixels, is_too_thin, to_rgb

__all__ = ["SUFFIXES", "batched", "find_images", "read_image", "read_images"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""What is taken for an image in a folder. A file that is named itself may be called anything."""


def find_images(places: Sequence[str | Path]) -> list[Path]:
    """The images of files and folders, in the order given; those of a folder and its subfolders by name.

    What is hidden in a folder, such as the "._a.jpg" that macOS puts beside an a.jpg, is passed over.

    Args:
        places: Files and folders. A file that comes twice is taken once.

    Raises:
        DataError: A place does not exist, or a folder holds no image.
    """
    if not places:
        raise DataError("no images given: name files or folders")
    found: dict[Path, None] = {}
    for place in map(Path, places):
        if not place.exists():
            raise DataError(f"no such file or folder: {place}")
        inside = sorted(path for path in place.rglob("*") if _is_shown_image(path, place))
        if place.is_dir() and not inside:
            raise DataError(f"no image in folder {place}; what is looked for ends in {', '.join(SUFFIXES)}")
        found.update(dict.fromkeys(inside if place.is_dir() else [place]))
    return list(found)


def _is_shown_image(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.suffix.lower() in SUFFIXES and path.is_file()


def read_image(path: str | Path) -> Tensor:
    """An image, upright (its EXIF tag is heeded), as a float tensor (3, H, W) in 0..1.

    Raises:
        DataError: It cannot be read; the message is one line that names the file.
    """
    try:
        with Image.open(path) as file:
            if has_32_bit_pixels(file):
                raise ValueError(f"32-bit pixels (mode {file.mode}): only 8-bit and 16-bit images can be read")
            pixels = functional.pil_to_tensor(ImageOps.exif_transpose(to_rgb(file)))
    except UnidentifiedImageError:
        raise DataError(f"not a readable image: {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"unreadable image {path}: {getattr(error, 'strerror', None) or error}") from None
    return functional.to_dtype(pixels, torch.float32, scale=True)


def read_images(
    paths: Sequence[Path], longest_side: int | None = None, *, progress: bool = True
) -> Iterator[tuple[Path, Tensor]]:
    """Reads images one after another; those that cannot be used are named on the terminal and left out.

    Args:
        paths: The files.
        longest_side: Limit of the longer side that a detector resizes images to, pixels; an image that is too thin for
            it cannot be used. None: there is no limit.
        progress: Whether to show a progress bar.

    Yields:
        Path and image, see `read_image`.

    Raises:
        DataError: None of them can be used.
    """
    bad = 0
    for path in tqdm(paths, "images", unit="img", disable=not progress):
        try:
            image = read_image(path)
            height, width = image.shape[1:]
            if longest_side is not None and is_too_thin(width, height, longest_side):
                raise DataError(f"image {path} of {width}x{height} is too thin for a detector of {longest_side} pixels")
        except DataError as error:
            bad += 1
            tqdm.write(f"skipped: {error}")
            continue
        yield path, image
    if bad == len(paths):
        raise DataError(f"none of the {bad} images can be used")
    if bad:
        print(f"{bad} of {len(paths)} images cannot be used and were skipped")


def batched(images: Iterable[tuple[Path, Tensor]], size: int) -> Iterator[tuple[list[Path], list[Tensor]]]:
    """Groups what `read_images` yields by ``size``; the last group may be smaller."""
    group: list[tuple[Path, Tensor]] = []
    for item in images:
        group.append(item)
        if len(group) == size:
            yield [path for path, _ in group], [image for _, image in group]
            group = []
    if group:
        yield [path for path, _ in group], [image for _, image in group]
