"""Random predictions and objects for the detectors that predict from points, as tensors and as plain lists."""

import random

import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from adapters.detection import PointGenerator, convert_fpn_

STRIDES = (8, 16, 32, 64)
SIZES = [(12, 16), (6, 8), (3, 4), (2, 2)]
LEVEL_SIZES = [height * width for height, width in SIZES]
HEIGHT, WIDTH = 96, 128
NUM_CLASSES = 5
KINDS = ("any", "tiny", "large", "outside", "twin")


class Stub(nn.Module):
    """A backbone for detectors of which only losses and postprocessing are used."""

    out_channels = 8


class SmallBackbone(nn.Module):
    """Three convolutions and a narrow pyramid P3 to P7: a detector's life in milliseconds."""

    out_channels = 16

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList(nn.Conv2d(i, 8, k, stride=k) for i, k in ((3, 8), (8, 2), (8, 2)))
        self.fpn = FeaturePyramidNetwork([8, 8, 8], 16, LastLevelP6P7(16, 16))

    def forward(self, x):
        maps = {}
        for level, conv in enumerate(self.body):
            x = conv(x).relu()
            maps[str(level)] = x
        return self.fpn(maps)


def make_model(model, neck="fpn", seed=0, size=64, **settings):
    """A whole detector for images of 64 pixels and 4 classes."""
    torch.manual_seed(seed)
    made = model(SmallBackbone(), 4, min_size=size, max_size=size, **settings)
    if neck == "ifpn":
        # Narrow necks on maps of single pixels do not always meet their tolerance; that is tested elsewhere.
        convert_fpn_(made, on_failure="ignore")
    return made


def make_detector(model, dtype=torch.float64, strides=STRIDES, **settings):
    torch.manual_seed(3)
    made = model(Stub(), NUM_CLASSES, anchor_generator=PointGenerator(strides), **settings).to(dtype)
    if hasattr(made, "center_prior"):
        with torch.no_grad():
            made.center_prior.mu.normal_(std=0.5)
            made.center_prior.sigma.uniform_(0.5, 2)
    return made


def squares_of(sizes=SIZES, strides=STRIDES):
    maps = [torch.zeros(1, 1, *size) for size in sizes]
    images = type("Images", (), {"image_sizes": [(HEIGHT, WIDTH)]})
    return PointGenerator(strides)(images, maps)[0]


def random_boxes(kinds, seed):
    """One box per kind. "outside" lies partly or wholly beyond the image, "twin" almost or exactly on the last box."""
    rng, boxes = random.Random(seed), []
    for kind in kinds:
        x, y, w, h = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), rng.uniform(4, 90), rng.uniform(4, 90)
        if kind == "tiny":
            w, h = rng.uniform(0.1, 6), rng.uniform(0.1, 6)
        elif kind == "large":
            w, h = rng.uniform(100, 400), rng.uniform(100, 400)
        elif kind == "outside":
            x, y = rng.choice((-1, 1)) * rng.uniform(120, 300), rng.uniform(-50, 150)
        box = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        if kind == "twin" and boxes:
            shift = rng.choice((0.0, rng.uniform(-3, 3)))
            box = [side + shift for side in boxes[-1]]
        boxes.append(box)
    return boxes


def make_batch(kinds_of_images, seed, dtype=torch.float64, num_points=256, spread=2.0):
    """Outputs of a head, and targets, for one image per list of kinds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(len(kinds_of_images), num_points, *shape, generator=generator, dtype=torch.float64)

    outputs = {
        "cls_logits": spread * normal(NUM_CLASSES),
        "bbox_regression": (2 + 2 * normal(4)).relu(),
        "bbox_ctrness": spread * normal(1),
    }
    outputs = {name: value.to(dtype).requires_grad_() for name, value in outputs.items()}
    targets = []
    for image, kinds in enumerate(kinds_of_images):
        boxes = torch.tensor(random_boxes(kinds, 1000 * seed + image), dtype=torch.float64).reshape(-1, 4)
        labels = torch.randint(1, NUM_CLASSES, (len(kinds),), generator=generator)
        targets.append({"boxes": boxes.to(dtype), "labels": labels})
    return outputs, targets


def as_lists(outputs, targets):
    """The same for `reference_detectors`: one dict of lists per image."""
    return [
        {
            "logits": outputs["cls_logits"][index].tolist(),
            "distances": outputs["bbox_regression"][index].tolist(),
            "quality": outputs["bbox_ctrness"][index, :, 0].tolist(),
            "boxes": target["boxes"].tolist(),
            "labels": target["labels"].tolist(),
        }
        for index, target in enumerate(targets)
    ]


def compute_losses(model, outputs, targets, sizes=SIZES):
    squares = squares_of(sizes, model.anchor_generator.strides)
    return model.compute_loss(targets, outputs, [squares] * len(targets), [h * w for h, w in sizes])


def close_to(losses, expected, rel):
    assert set(losses) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].item(), value, rtol=rel, atol=rel, msg=lambda m, n=name: f"{n}: {m}")
