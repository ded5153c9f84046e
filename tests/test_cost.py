"""What a detector costs: counts against closed forms, what is measured, and the command."""

import json

import pytest
import torch
from checkpoints import small_config, write_checkpoint, write_image
from torch import nn
from torchvision.ops import DeformConv2d, FrozenBatchNorm2d

from adapters.detection import build_detector
from adapters.detection.__main__ import main
from adapters.detection.cost import calibrate_, count_macs, measure_cost, noise
from adapters.detection.cost_report import as_trained, format_cost, read_detector
from adapters.detection.data import DataError
from adapters.detection.memory import PeakMemory


def cells(height, width):
    """Numbers of cells on C3..C5 and P6, P7: every stride of 2 rounds up."""
    counts = []
    for _ in range(7):
        height, width = -(-height // 2), -(-width // 2)
        counts.append(height * width)
    return counts[2:]


def fpn_macs(height, width, c, widths):
    """Laterals, 3x3 convolutions, P6 from P5 and P7 from P6."""
    p3, p4, p5, p6, p7 = cells(height, width)
    levels = [(p, w) for p, w in zip((p3, p4, p5), widths, strict=True)]
    return sum(p * (w * c + 9 * c * c) for p, w in levels) + (p6 + p7) * 9 * c * c


def head_macs(height, width, c, classes, anchors=9):
    return sum(cells(height, width)) * 9 * c * (2 * 4 * c + anchors * (classes + 4))


def g_macs(height, width, c):
    """Two 3x3 convolutions per level in the residual blocks; 3x3 from the same, the coarser and the finer level."""
    n = cells(height, width)
    blocks = 2 * sum(n)
    connections = sum(n) + sum(n[1:]) + sum(n[1:])  # from above at the source's size, from below at the target's
    return 9 * c * c * (blocks + connections)


def on_meta(neck, backbone, channels, classes, **settings):
    with torch.device("meta"):
        return build_detector(
            "retinanet", backbone, neck, num_classes=classes, weights_backbone=None, neck_channels=channels, **settings
        )


@pytest.mark.parametrize(
    ("backbone", "channels", "classes", "height", "width", "widths"),
    [("resnet18", 16, 4, 96, 160, (128, 256, 512)), ("resnet50", 256, 91, 800, 1344, (512, 1024, 2048))],
)
def test_counts_are_the_closed_forms(backbone, channels, classes, height, width, widths):
    x = torch.empty(1, 3, height, width, device="meta")
    explicit = on_meta("fpn", backbone, channels, classes)
    counted = count_macs(lambda: explicit.backbone(x))
    levels = list(explicit.backbone(x).values())
    head = count_macs(lambda: explicit.head(levels))[""]
    implicit = on_meta("ifpn", backbone, channels, classes, neck_settings={"unroll": 1})
    g = count_macs(lambda: implicit.backbone(x))["fpn.module"]
    assert counted["fpn"] == fpn_macs(height, width, channels, widths)
    assert head == head_macs(height, width, channels, classes)
    assert g == g_macs(height, width, channels)
    if height == 800:  # GMACs, as worked out by hand for the paper's setting
        found = [counted["body"], counted["fpn"], head, g]
        assert [round(macs / 1e9, 1) for macs in found] == [87.6, 17.1, 149.8, 46.2]


def measured(neck, training=True, detector="retinanet", **settings):
    config = small_config(neck, detector, **settings)
    torch.manual_seed(0)
    return measure_cost(config.build, noise(2, 64, 96, "cpu"), repeats=1, training=training)


@pytest.mark.parametrize("preset", [{"preset": "paper"}, {"unroll": 3}, {"rtol": 1e-2}])
def test_g_counts_as_often_as_it_is_evaluated(preset):
    cost = measured("ifpn", neck_settings=preset)
    parts = {part.name: part for part in cost.parts}
    g = parts["neck: G, per evaluation"]
    assert g.macs == g_macs(64, 96, 16)  # 64 x 96 is a multiple of 32: nothing is padded
    assert cost.input_size == (64, 96) and cost.batch_size == 2
    assert sum(part.total_macs for part in cost.parts) == pytest.approx(cost.inference.macs)
    assert sum(part.parameters for part in cost.parts) == cost.parameters == cost.trainable
    assert parts["head"].macs == head_macs(64, 96, 16, 3)
    if "unroll" in preset:
        assert (g.evaluations, cost.training_evaluations, cost.backward_evaluations) == (3, 3, 0)
        assert "neck: solver" not in parts
    elif "preset" in preset:
        assert (g.evaluations, cost.training_evaluations, cost.backward_evaluations) == (8, 17, 16)
    else:
        assert g.evaluations > 2 and cost.backward_evaluations > 2
    assert cost.training is not None and cost.training.macs > 2 * cost.inference.macs
    assert cost.inference.seconds > 0 and cost.training.images_per_second > 0


def test_a_step_of_an_explicit_detector_costs_three_times_its_forward_pass():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2), nn.Conv2d(4, 2, 1)
    )
    x = torch.rand(1, 4, 9, 9, requires_grad=True)
    forward = count_macs(lambda: model(x))[""]
    assert forward == 49 * 8 * 2 * 9 + 49 * 8 * 2 * 4 + 196 * 4 * 2
    assert count_macs(lambda: model(x).sum().backward())[""] == 3 * forward
    constant = count_macs(lambda: model(x.detach()).sum().backward())[""]  # no gradient for the first input
    assert constant == 3 * forward - 49 * 8 * 2 * 9


def test_deformable_convolutions_count():
    layer, x = DeformConv2d(4, 6, 3, padding=1, groups=2), torch.rand(2, 4, 5, 7, requires_grad=True)
    offset = torch.zeros(2, 18, 5, 7)
    forward = 2 * 5 * 7 * 6 * 2 * 9
    assert count_macs(lambda: nn.Sequential(layer)[0](x, offset))[""] == forward
    assert count_macs(lambda: layer(x, offset).sum().backward())[""] == 3 * forward


def test_two_stage_detectors():
    cost = measured("ifpn", detector="fasterrcnn", training=False)
    names = [part.name for part in cost.parts]
    assert "rpn" in names and "roi heads" in names and cost.training is None
    assert sum(part.total_macs for part in cost.parts) == pytest.approx(cost.inference.macs)


def test_frozen_norms_without_weights_are_calibrated_and_frozen_layers_not_trained():
    config = small_config("fpn", frozen_norm=True, backbone="resnet50")
    model = as_trained(config.build(), config)
    images = noise(1, 64, 96, "cpu")
    x = model.transform(images)[0].tensors
    with torch.no_grad():
        assert max(level.std() for level in model.backbone.body(x).values()) > 10
        calibrate_(model, images)
        assert max(level.std() for level in model.backbone.body(x).values()) < 5
    norm = next(module for module in model.modules() if isinstance(module, FrozenBatchNorm2d))
    assert not norm._forward_pre_hooks
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad and ".body." in name}
    assert trained == {"layer2", "layer3", "layer4"}


def test_memory_grows_with_what_is_used():
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    before = memory.peak()
    if before is None:
        pytest.skip("the peak memory of a process cannot be read here")
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert memory.peak() - before >= 0.8 * block.numel()
    del block
    memory.reset()
    assert memory.peak() - before < 32 * 2**20


def test_the_command(tmp_path, capsys):
    checkpoint, image = write_checkpoint(tmp_path / "a.ckpt"), write_image(tmp_path / "a.png")
    out = tmp_path / "cost.json"
    words = ["cost", "--checkpoint", str(checkpoint), "--repeats=1", "--images", str(image), "--out", str(out)]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "neck: G, per evaluation" in table and "images/s" in table and "random" not in table
    found = json.loads(out.read_text())
    assert found["detector"]["neck"] == "ifpn" and found["cost"]["parts"][0]["name"] == "backbone"
    assert found["cost"]["input_size"] == [64, 96]
    assert main(words) == 2 and "exists already" in capsys.readouterr().err
    config = tmp_path / "run.yaml"
    config.write_text(
        "model:\n  detector: {backbone: resnet18, neck_channels: 16, image_size: 64, neck_settings: {rtol: 1e-2}}\n"
        "data: {root: nowhere}\ntrainer: {max_steps: 3}\n"
    )
    assert main(["cost", "--config", str(config), "--repeats=1", "--training=false", "--num_classes=3"]) == 0
    output = capsys.readouterr().out
    assert "input 64 x 128 pixels" in output and "weights are random" in output and "training step" not in output
    for words in ([], ["--config", str(config), "--checkpoint", str(checkpoint)]):
        assert main(["cost", *words]) == 2
        assert "give either --config or --checkpoint" in capsys.readouterr().err


def test_config_files(tmp_path):
    paper = read_detector("recipes/t2_autoassign_unroll2.yaml", 91)
    assert paper.detector == "autoassign" and paper.neck_settings["unroll"] == 2 and paper.frozen_norm
    path = tmp_path / "c.yaml"
    path.write_text("model: {detector: {neck_settings: {rtol: 1e-2}}}")
    assert read_detector(str(path), 3).neck_settings == {"rtol": 0.01}
    for text, message in (
        ("model: {detector: {neck: bifpn}}", "unknown neck 'bifpn'"),
        ("model: {detector: {depth: 3}}", "depth"),
        ("model: {detector: small}", "no set of names"),
        ("[1, 2]", "not a config file"),
        ("model: [", "c.yaml"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_detector(str(path), 3)
    with pytest.raises(DataError, match="cannot read"):
        read_detector(str(tmp_path / "none.yaml"), 3)


def test_the_table_adds_up():
    cost = measured("fpn", training=False)
    lines = format_cost(cost, random_weights=True).splitlines()
    assert lines[0].startswith("input 64 x 96 pixels, batches of 2, cpu") and "random" not in lines[-1]
    assert any(line.startswith("neck: FPN") for line in lines)
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        measure_cost(lambda: None, [], repeats=0)
