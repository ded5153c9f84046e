"""Exported detectors: the detections of the eager ones, from a file, for any batch size; ONNX; what is refused."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.ops import batched_nms

from adapters.detection import build_detector, check_fixed_steps, export_command, export_detector, export_onnx
from adapters.detection.__main__ import main
from adapters.detection.small_systems import cholesky_ex, cholesky_solve, solve_ex
from adapters.detection.tensor_detector import suppress
from adapters.detection.training import DetectionModule, DetectorConfig, Schedule
from adapters.detection.training.cli import PACKAGE

SIZE = (64, 90)
STEPS = 2
NAMES = ("retinanet", "fcos", "fcos_paper", "atss", "autoassign", "fasterrcnn")


def images(batch=2, size=SIZE):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(5))


def detector(name, neck, *, min_size=64, seed=0, neck_settings=None, **kwargs):
    """A small detector in eval mode that detects something in noise: features are normalised, classes spread."""
    torch.manual_seed(seed)
    limit = {"box_detections_per_img" if name == "fasterrcnn" else "detections_per_img": 15}
    if name == "fasterrcnn":
        limit |= {"rpn_post_nms_top_n_test": 60, "box_score_thresh": 0.02}
    channels = 32 if name == "fcos" else 16  # torchvision's FCOS has 32 groups
    settings = None if neck == "fpn" else {"on_failure": "ignore"} | (neck_settings or {})
    model = build_detector(
        name, "resnet18", neck, weights_backbone=None, num_classes=4, neck_channels=channels, min_size=min_size,
        max_size=100, neck_settings=settings, **limit, **kwargs,
    )  # fmt: skip
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        x = model.transform(list(images(4)))[0].tensors
        model.backbone.body(x)
        if name == "fasterrcnn":
            nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=2.0)
            nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=2.0)
        else:
            logits = model.eval().head(list(model.backbone(x).values()))["cls_logits"]
            last = model.head.classification_head.cls_logits
            last.weight *= 4.0 / (logits - logits.median()).abs().max()  # sigmoids of 1 would be equal scores
            last.bias.fill_(-2.0)
    model.eval()
    return model


def fixed(model, steps=STEPS):
    """The detector that an exported program stands for, made by hand."""
    neck = model.backbone.fpn
    neck.rtol, neck.eval_max_steps = 0.0, steps
    return model


def assert_same(outputs, expected, atol=1e-5):
    assert len(outputs["boxes"]) == len(expected)
    for i, detections in enumerate(expected):
        n = len(detections["boxes"])
        assert int(outputs["num_detections"][i]) == n
        for name, value in detections.items():
            torch.testing.assert_close(outputs[name][i][:n], value, atol=atol, rtol=1e-5)
        assert (outputs["boxes"][i][n:] == 0).all() and (outputs["scores"][i][n:] == 0).all()
        assert (outputs["labels"][i][n:] == -1).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_program_detects_what_the_detector_does(name, tmp_path) -> None:
    settings = None if name == "retinanet" else {"solver": "fixed_point"}  # as that is exported in half the time
    model = detector(name, "ifpn", neck_settings=settings)
    torch.export.save(export_detector(model, SIZE, num_steps=STEPS), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert model.backbone.fpn.rtol > 0  # the user's is left alone
    x = images(3)
    with torch.no_grad():
        expected = fixed(model)(list(x))
    assert sum(len(e["boxes"]) for e in expected) >= 9
    assert_same(program(x), expected)
    assert_same(program(x[1:2]), expected[1:2])


@pytest.mark.parametrize("name", NAMES)
def test_with_an_explicit_neck_and_resizing(name) -> None:
    """Images of 40 x 56 are resized to 64 x 90, padded to 64 x 96, and the boxes are scaled back."""
    model = detector(name, "fpn", neck_settings=None)
    x = images(2, (40, 56))
    program = export_detector(model, (40, 56)).module()
    with torch.no_grad():
        expected = model(list(x))
    assert sum(len(e["boxes"]) for e in expected) >= 6
    assert_same(program(x), expected)


def test_masked_padding_needs_a_batch_size() -> None:
    model = detector("autoassign", "ifpn", neck_settings={"mask_padding": True, "solver": "fixed_point"})
    with pytest.raises(ValueError, match="give batch_size"):
        export_detector(model, SIZE, num_steps=STEPS)
    program = export_detector(model, SIZE, num_steps=STEPS, batch_size=2).module()
    with torch.no_grad():
        expected = fixed(model)(list(images()))
    assert_same(program(images()), expected)


def test_suppression_is_torchvisions() -> None:
    torch.manual_seed(0)
    corners = torch.rand(2, 120, 2) * 40
    boxes = torch.cat((corners, corners + torch.rand(2, 120, 2) * 30), dim=2)
    boxes[:, 7] = boxes[:, 8, [0, 1, 0, 1]]  # without an area
    scores, labels = torch.rand(2, 120), torch.randint(0, 3, (2, 120))
    left_out = scores < 0.2
    chosen, top = suppress(boxes, scores.masked_fill(left_out, -1.0), labels, 0.4, 100)
    for i in range(2):
        keep = (~left_out[i]).nonzero().squeeze(1)
        keep = keep[batched_nms(boxes[i, keep], scores[i, keep], labels[i, keep], 0.4)]
        assert len(keep) < 96
        torch.testing.assert_close(chosen[i, : len(keep)], keep)
        torch.testing.assert_close(top[i, : len(keep)], scores[i, keep])
        assert (top[i, len(keep) :] == -1).all()


def test_residual_after_fixed_steps() -> None:
    model = detector("retinanet", "ifpn", neck_settings={"rtol": 1e-4, "max_steps": 40})
    before = model.backbone.fpn.last_solution
    few, many = (check_fixed_steps(model, images(), steps) for steps in (1, 30))
    assert few is not None and many is not None
    assert few.residual > 1e-4 >= many.own_residual and not few.suffices and many.suffices
    assert few.own_steps == many.own_steps < 30 and few.rtol == 1e-4
    assert "after 1 steps" in str(few) and "rtol=0.0001" in str(few)
    assert model.backbone.fpn.last_solution is before
    fixed(model, 1)(list(images()))
    assert few.residual == model.backbone.fpn.last_solution.relative_residual.max().item()
    assert check_fixed_steps(detector("retinanet", "fpn"), images()) is None


class OwnDecoding(FCOS):
    def postprocess_detections(self, *args):
        return []


@pytest.mark.parametrize(
    ("make", "settings", "error", "message"),
    [
        (lambda: detector("fcos", "ifpn"), {"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        (lambda: detector("fcos", "ifpn"), {"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        (lambda: detector("fcos", "ifpn"), {"image_size": (64,)}, ValueError, r"image_size must be .*\(64,\)"),
        (lambda: detector("fcos", "fpn"), {"num_steps": 3}, ValueError, "neck has no solver"),
        (lambda: detector("fcos", "fpn").half(), {}, ValueError, "float32 or float64, got torch.float16"),
        (lambda: nn.Linear(2, 2), {}, TypeError, "Linear cannot be exported; can be: RetinaNet"),
        (
            lambda: build_detector("maskrcnn", "resnet18", "fpn", weights_backbone=None),
            {},
            TypeError,
            "MaskRCNN cannot be exported: it predicts masks",
        ),
        (
            lambda: OwnDecoding(detector("fcos", "fpn").backbone, 3),
            {},
            TypeError,
            "OwnDecoding cannot be exported: it has a postprocess_detections of its own",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(make, settings, error, message) -> None:
    with pytest.raises(error, match=message):
        export_detector(make(), **{"image_size": SIZE} | settings)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_small_systems_are_solved_as_torch_does(n) -> None:
    torch.manual_seed(n)
    square, right = torch.randn(5, n, n, dtype=torch.float64), torch.randn(5, n, 2, dtype=torch.float64)
    square[0] = 0
    symmetric = square @ square.mT + 0.1 * torch.eye(n, dtype=torch.float64)
    factor, info = torch.linalg.cholesky_ex(symmetric)
    torch.testing.assert_close(cholesky_ex(symmetric), (factor, info))
    torch.testing.assert_close(cholesky_solve(right, factor), torch.cholesky_solve(right, factor))
    torch.testing.assert_close(solve_ex(square[1:], right[1:]), tuple(torch.linalg.solve_ex(square[1:], right[1:])))
    indefinite = symmetric - 2 * torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(cholesky_ex(indefinite)[1], torch.linalg.cholesky_ex(indefinite)[1])
    assert cholesky_ex(indefinite)[1].any() and solve_ex(square, right)[1].tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "neck", "settings"),
    [
        ("fcos_paper", "ifpn", {"neck_settings": {"preset": "fast"}}),
        ("atss", "ifpn", {"neck_settings": {"preset": "paper"}}),
        ("fasterrcnn", "fpn", {}),
        ("autoassign", "fpn", {"deformable_stages": ("c5",)}),
    ],
)
def test_onnx(name, neck, settings, tmp_path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    model, steps = detector(name, neck, **settings), 2  # the second makes use of what the first has brought
    export_onnx(export_detector(model, SIZE, num_steps=steps if neck == "ifpn" else None), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = images(3)
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, map(torch.from_numpy, session.run(None, {"images": x.numpy()})), strict=True))
    with torch.no_grad():
        expected = (fixed(model, steps) if neck == "ifpn" else model)(list(x))
    assert sum(len(e["boxes"]) for e in expected) >= 9
    # ONNX Runtime sums in another order. What that does to these random weights, float64 tells: eager float32 differs
    # from it by as much.
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(list(x.double()))
    assert [len(e["boxes"]) for e in exact] == [len(e["boxes"]) for e in expected]
    rounding = max((a["boxes"] - b["boxes"]).abs().max().item() for a, b in zip(exact, expected, strict=True))
    assert rounding < 1e-3
    assert_same(outputs, expected, atol=max(1e-4, 4 * rounding))


def test_onnx_asks_for_its_extra(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    program = torch.export.export(nn.ReLU(), (torch.ones(2),))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'deqkit\[export\]'"):
        export_onnx(program, tmp_path / "model.onnx")
    with pytest.raises(ModuleNotFoundError, match="export"):  # before the checkpoint is so much as looked for
        export_command.export(str(tmp_path / "a.ckpt"), str(tmp_path / "b.onnx"), format="onnx")


def test_onnx_names_the_operator_that_it_lacks(tmp_path) -> None:
    pytest.importorskip("onnxscript")

    class Determinant(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvalsh(x)

    program = torch.export.export(Determinant(), (torch.eye(2),))
    with pytest.raises(ValueError, match="no ONNX for this detector: .*linalg_eigh"):
        export_onnx(program, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    import lightning as L

    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    config = DetectorConfig(
        num_classes=3, detector="atss", neck_channels=16, image_size=64, neck_settings={"solver": "fixed_point"},
        options={"detections_per_img": 10},
    )  # fmt: skip
    module = DetectionModule(config, Schedule(total_steps=1), data={"categories": {7: "cat", 9: "dog"}})
    trainer = L.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def test_command(checkpoint, tmp_path, capsys) -> None:
    out = tmp_path / "new" / "model.pt2"
    words = ["export", f"--checkpoint={checkpoint}", f"--out={out}", "--num_steps=2", "--width=96"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "takes images (B, 3, 64, 96)" in told and "relative residual after 2 steps" in told
    extra = {"detector.json": ""}
    program = torch.export.load(out, extra_files=extra).module()
    assert program(torch.rand(1, 3, 64, 96))["boxes"].shape == (1, 10, 4)
    assert json.loads(extra["detector.json"]) == {"image_size": [64, 96], "labels": ["cat", "dog"]}

    assert main(words) == 2 and "exists already" in capsys.readouterr().err
    other = tmp_path / "other"
    for more, message in (
        (["--format=jit"], "unknown format 'jit'"),
        (["--num_steps=0"], "num_steps must be at least 1"),
        (["--image=none.png"], "unreadable image none.png: No such file"),
        (["--height=1", "--width=2000"], "image_size (1, 2000) is too thin"),
        ([f"--out={checkpoint}/model.pt2"], f"{checkpoint} is a file, not a folder"),
    ):
        assert main(["export", f"--checkpoint={checkpoint}", f"--out={other}", *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["export", "--checkpoint=none.ckpt", f"--out={other}"]) == 2
    assert "checkpoint not found: none.ckpt" in capsys.readouterr().err
    assert not other.exists()


def test_command_has_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "adapters.detection", "export", "--help"],
        capture_output=True, text=True, cwd=PACKAGE.parent.parent,
    )  # fmt: skip
    assert done.returncode == 0 and "--num_steps" in done.stdout
