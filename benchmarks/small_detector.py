"""A small detector with the i-FPN neck: trained by the run that needs it first, and kept for those after it.

It is the Faster R-CNN of `compare_necks.py`, which of all detectors learns most in few steps, on the set drawn there. A
cached detector belongs to its settings: to others there is another. The file is complete or is not there, and what
cannot be read is trained again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compare_necks import fit, make_data, parse_arguments, quiet_lightning, settings_of

from adapters.detection.data import verify_images
from adapters.detection.files import written_whole
from adapters.detection.training import DetectionModule, load_checkpoint

DETECTOR, NECK = "fasterrcnn", "ifpn"
FULL = {"steps": 300, "val_images": 100}
QUICK = {"steps": 2, "train_images": 4, "val_images": 4, "channels": 16}
KEY = "small_detector"  # in the checkpoint: the settings that it was trained with


def small_detector(
    cache: Path, device: str, *, seed: int, mixing: float = 2.0, quick: bool = False, retrain: bool = False
) -> Path:
    """The checkpoint of the detector, trained if it is not there yet.

    Args:
        cache: folder of the detectors, one folder each, with the images.
        device: where to train.
        seed: of weights, order and augmentation.
        mixing: factor on the random weights of G's cross-scale connection before the training. They are drawn from the
            paper's N(0, 0.01), with which 64 channels mix half as strongly as its 256: 2 makes up for that.
        quick: the smallest detector there can be, which finds nothing: for tests.
        retrain: train again even if it is there.

    Raises:
        FileExistsError: something else is in the place of the images.
        DataError: the images of the set cannot be used.
        KeyboardInterrupt: the training was stopped; nothing is kept of it.
    """
    accelerator = torch.device(device).type
    given = [f"--{name.replace('_', '-')}={value}" for name, value in (QUICK if quick else FULL).items()]
    settings = settings_of(parse_arguments(given)) | {
        "detector": DETECTOR,
        "neck": NECK,
        "seed": seed,
        "mixing": mixing,
    }
    del settings["device"]  # the detector is what was asked for, wherever it was trained
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    folder = cache / f"{DETECTOR}-{key}"
    path = folder / "detector.ckpt"
    if not retrain and is_complete(path, settings):
        return path
    args = parse_arguments([*given, f"--out={folder}", f"--device={accelerator}"])
    print(f"training a small detector, kept in {folder}", flush=True)
    quiet_lightning()
    data = make_data(args, seed)
    for dataset in (data.train_dataset, data.val_dataset):
        verify_images(dataset.annotations, dataset.folder, progress=sys.stderr.isatty())

    def prepare(module: DetectionModule) -> None:
        neck: Any = module.neck
        with torch.no_grad():
            for name, parameter in neck.transform.cross_scale.named_parameters():
                if name.endswith("weight"):
                    parameter.mul_(mixing)

    module, _ = fit(args, DETECTOR, NECK, seed, data, prepare)
    checkpoint: dict[str, Any] = {"state_dict": module.cpu().state_dict(), KEY: settings}
    module.on_save_checkpoint(checkpoint)
    with written_whole(path) as partial:
        torch.save(checkpoint, partial)
    return path


def is_complete(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the file is a detector trained with these settings."""
    if not path.exists():
        return False
    try:
        load_checkpoint(path)
        found = torch.load(path, map_location="cpu", weights_only=True).get(KEY)
    except ValueError as error:
        print(f"{error}: trained again", file=sys.stderr)
        return False
    return found == dict(settings)
