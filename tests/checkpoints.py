"""Checkpoints of small detectors with random weights, as a training writes them."""

import torch
from PIL import Image

from adapters.detection.training import DetectionModule, DetectorConfig, Schedule

CATEGORIES = {3: "cat", 7: "dog"}  # sparse, as COCO's


def small_config(neck="ifpn", detector="retinanet", **settings):
    defaults = {"image_size": 64, "max_size": 96, "neck_channels": 16, "num_classes": 3}
    if neck == "ifpn":
        defaults["neck_settings"] = {"rtol": 1e-3}
    return DetectorConfig(neck=neck, detector=detector, **defaults | settings)


def write_checkpoint(path, neck="ifpn", detector="retinanet", data=None, **settings):
    """The path, after a checkpoint was written there."""
    torch.manual_seed(0)
    module = DetectionModule(small_config(neck, detector, **settings), Schedule(1, warmup_steps=0), data=data)
    content = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    torch.save(content, path)
    return path


def write_image(path, seed=0, size=(96, 64), **how):
    """A picture of noise, width x height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(
        0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    Image.fromarray(pixels.numpy()).save(path, **how)
    return path
