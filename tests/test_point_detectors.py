"""What PaperFCOS, ATSS and AutoAssign share: points, head, precision, targets, ranks, and the life of a model."""

import copy
import io
import pickle
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from point_batches import (
    NUM_CLASSES,
    STRIDES,
    as_lists,
    compute_losses,
    make_batch,
    make_detector,
    make_model,
    squares_of,
)
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import FCOS, fcos_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from adapters.detection import ATSS, AutoAssign, ModulatedDeformConv2d, PaperFCOS, PointGenerator, build_detector
from adapters.detection.deformable import make_stages_deformable_
from adapters.detection.point_head import PointHead

MODELS = [PaperFCOS, ATSS, AutoAssign]
SMALL = {"weights_backbone": None, "num_classes": 4, "neck_channels": 16, "min_size": 64, "max_size": 64}


def images_and_targets(size=64, empty=False):
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, side, size, generator=generator) for side in (size, size * 3 // 4)]
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    boxes = torch.tensor([[5.0, 5, 40, 40], [10, 10, 60, 60]]) * size / 64
    objects = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    return images, [nothing if empty else objects, nothing]


# -- points ----------------------------------------------------------------------------------------------------------


def test_points_have_fixed_strides_and_no_offset():
    sizes = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
    maps = [torch.zeros(2, 1, *size, dtype=torch.bfloat16) for size in sizes]
    images = ImageList(torch.zeros(2, 3, 800, 1344), [(800, 1344), (750, 1300)])
    squares = PointGenerator()(images, maps)
    assert len(squares) == 2 and squares[0] is squares[1] and squares[0].dtype == torch.float32
    levels = squares[0].split([height * width for height, width in sizes])
    for level, (height, width), stride in zip(levels, sizes, PointGenerator().strides, strict=True):
        grid = level.view(height, width, 4)
        assert grid[0, 0].tolist() == [-stride / 2, -stride / 2, stride / 2, stride / 2]
        centre = (grid[-1, -1, :2] + grid[-1, -1, 2:]) / 2
        assert centre.tolist() == [(width - 1) * stride, (height - 1) * stride]
    # Torchvision's measures its strides: the fourth level's are 61 and 64.
    theirs = AnchorGenerator(((64,),) * 5, ((1.0,),) * 5)(images, [m.float() for m in maps])[0].split(
        [len(x) for x in levels]
    )
    assert theirs[3].view(13, 21, 4)[1, 0, 1] - theirs[3][0, 1] == 61


def test_points_refuse_what_they_do_not_fit():
    with pytest.raises(ValueError, match=r"strides for 5 levels, got 2"):
        PointGenerator()(ImageList(torch.zeros(1, 3, 8, 8), [(8, 8)]), [torch.zeros(1, 1, 1, 1)] * 2)
    for strides in ((), (8, 0)):
        with pytest.raises(ValueError, match="strides must be positive"):
            PointGenerator(strides)
    for model in MODELS:
        with pytest.raises(TypeError, match="must be a PointGenerator, got AnchorGenerator"):
            make_model(model, anchor_generator=AnchorGenerator(((8,),), ((1.0,),)))
        with pytest.raises(ValueError, match="scales for 4 levels, got 5 feature maps"):
            make_model(model, anchor_generator=PointGenerator(STRIDES))(*images_and_targets())


# -- head ------------------------------------------------------------------------------------------------------------


def test_the_head_has_the_layout_of_torchvision():
    with torch.device("meta"):
        theirs = fcos_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
        ours = build_detector("atss", "resnet50", "fpn", weights_backbone=None).state_dict()
    assert set(ours) - set(theirs) == {"head.regression_head.scales"} and set(theirs) <= set(ours)
    assert all(ours[name].shape == value.shape for name, value in theirs.items())
    assert {m.num_groups for m in PointHead(256, 3).modules() if isinstance(m, nn.GroupNorm)} == {32}


STARTS = [(PaperFCOS, 0.01, 0.0), (ATSS, 0.01, 0.0), (AutoAssign, 0.02, 4.0)]


@pytest.mark.parametrize(("model", "prior", "bias"), STARTS)
def test_the_head_starts_as_published(model, prior, bias):
    head = make_detector(model).head
    logits = head.classification_head.cls_logits
    assert torch.allclose(logits.bias.sigmoid(), torch.tensor(prior, dtype=torch.float64))
    assert (head.regression_head.bbox_reg.bias == bias).all() and not head.regression_head.bbox_ctrness.bias.any()
    convs = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 11
    assert torch.cat([conv.weight.flatten() for conv in convs]).std().item() == pytest.approx(0.01, rel=0.05)
    towers = (head.classification_head.conv, head.regression_head.conv)
    assert not any(conv.bias.any() for tower in towers for conv in tower if isinstance(conv, nn.Conv2d))
    assert (head.regression_head.scales == 1).all()


def test_distances_are_scaled_per_level_and_not_negative():
    torch.manual_seed(0)
    head = PointHead(8, 3, num_levels=2, box_bias=1.0)
    maps = [torch.randn(2, 8, 4, 6), torch.randn(2, 8, 2, 3)]
    before = head(maps)
    assert before["cls_logits"].shape == (2, 30, 3) and before["bbox_ctrness"].shape == (2, 30, 1)
    with torch.no_grad():
        head.regression_head.scales.copy_(torch.tensor([3.0, -1.0]))
    after = head(maps)
    torch.testing.assert_close(after["bbox_regression"][:, :24], 3 * before["bbox_regression"][:, :24])
    assert before["bbox_regression"].min() > 0 and not after["bbox_regression"][:, 24:].any()
    assert torch.equal(after["bbox_ctrness"], before["bbox_ctrness"])
    # Row by row, as the points.
    tower = head.classification_head
    expected = tower.cls_logits(tower.conv(maps[0]))[1, :, 2, 5]
    torch.testing.assert_close(before["cls_logits"][1, 2 * 6 + 5], expected)


# -- precision and targets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_losses_are_computed_in_float32(model):
    """bfloat16 predictions under autocast: the losses are those of the rounded numbers, exactly."""
    detector = make_detector(model, torch.float32)
    outputs, targets = make_batch([["any"] * 4, ["large", "tiny"]], 3, torch.float32)
    rounded = {name: value.detach().bfloat16() for name, value in outputs.items()}
    exact = compute_losses(detector, {name: value.float() for name, value in rounded.items()}, targets)
    with torch.autocast("cpu", torch.bfloat16):
        losses = compute_losses(detector, rounded, targets)
    assert all(torch.equal(losses[name], exact[name]) for name in exact)


@pytest.mark.parametrize("model", MODELS)
def test_detections_are_decoded_in_float32(model):
    detector = make_detector(model, torch.float32, score_thresh=0.3)
    outputs, _ = make_batch([[]], 3, torch.float32)
    rounded = {name: value.detach().bfloat16() for name, value in outputs.items()}
    squares, sizes = squares_of(), [192, 48, 12, 4]
    found = []
    for values in (rounded, {name: value.float() for name, value in rounded.items()}):
        levels = {name: list(value.split(sizes, dim=1)) for name, value in values.items()}
        with torch.autocast("cpu", torch.bfloat16):
            found += detector.postprocess_detections(levels, [list(squares.split(sizes))], [(96, 128)])
    assert len(found[0]["boxes"]) > 10 and found[0]["boxes"].dtype == torch.float32
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("model", MODELS)
def test_unusable_targets_are_named(model):
    detector = make_detector(model)
    outputs, targets = make_batch([["any", "any"]], 1)
    for label in (NUM_CLASSES, -1):
        targets[0]["labels"][1] = label
        with pytest.raises(ValueError, match=f"labels must be 0 to 4, as num_classes is 5; found {label}"):
            compute_losses(detector, outputs, targets)
    targets[0]["labels"] = torch.tensor([1])
    with pytest.raises(ValueError, match="image 0 has 2 boxes and 1 labels"):
        compute_losses(detector, outputs, targets)


@pytest.mark.parametrize("model", MODELS)
def test_boxes_of_any_float_dtype_and_crowds(model):
    detector = make_detector(model, torch.float32)
    outputs, targets = make_batch([["any"] * 150], 1, torch.float32)
    halves = [{"boxes": target["boxes"].half(), "labels": target["labels"]} for target in targets]
    rounded = [{"boxes": target["boxes"].float(), "labels": target["labels"]} for target in halves]
    losses, expected = (compute_losses(detector, outputs, given) for given in (halves, rounded))
    assert all(torch.equal(losses[name], expected[name]) and losses[name].isfinite() for name in expected)
    assert as_lists(outputs, targets)[0]["boxes"] == targets[0]["boxes"].tolist()


# -- ranks -----------------------------------------------------------------------------------------------------------

# As many images per rank, so that the mean over images is the mean over ranks. The second rank has few objects.
RANKS = ([["any"] * 9, ["large", "any"]], [["tiny", "large"], []])
LONELY = ([["any"] * 9, ["large"]], [[], []])


def _losses_of_rank(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        results = {}
        for case, ranks in (("both", RANKS), ("lonely", LONELY)):
            for model in MODELS:
                outputs, targets = make_batch(ranks[rank], 10 + rank)
                losses = compute_losses(make_detector(model), outputs, targets)
                sum(losses.values()).backward()
                gradients = {name: value.grad for name, value in outputs.items()}
                results[case, model.__name__] = ({n: v.detach() for n, v in losses.items()}, gradients)
        torch.save(results, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_ranks_together_have_the_losses_of_one_process(tmp_path):
    """Normalisers are averaged over ranks, so that what DDP averages is the loss of all images."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_losses_of_rank, (port, tmp_path), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case, ranks in (("both", RANKS), ("lonely", LONELY)):
        batches = [make_batch(kinds, 10 + rank) for rank, kinds in enumerate(ranks)]
        for model in MODELS:
            outputs = {n: torch.cat([b[0][n] for b in batches]).detach().requires_grad_() for n in batches[0][0]}
            expected = compute_losses(make_detector(model), outputs, [t for _, targets in batches for t in targets])
            sum(expected.values()).backward()
            mine = [rank[case, model.__name__] for rank in found]
            for name, value in expected.items():
                mean = (mine[0][0][name] + mine[1][0][name]) / 2
                torch.testing.assert_close(mean, value.detach(), msg=f"{case} {model} {name}")
            for name, value in outputs.items():
                gradient = torch.cat([gradients[name] for _, gradients in mine]) / 2
                torch.testing.assert_close(gradient, value.grad, msg=f"{case} {model} {name}")


# -- deformable convolutions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_deformable_convolution_starts_as_half_of_the_plain_one(groups, stride):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, stride=stride, padding=1, groups=groups, bias=False)
    x = torch.randn(2, 8, 7, 9)
    deformable = ModulatedDeformConv2d(conv)
    torch.testing.assert_close(deformable(x), conv(x) / 2)
    deformable(x).square().sum().backward()
    assert deformable.weight.grad.any() and deformable.offset.weight.grad.any()
    assert set(deformable.state_dict()) == {"weight", "offset.weight", "offset.bias"}
    # Offsets (0, 1) everywhere read the neighbour on the right; a large modulation logit lets all through.
    with torch.no_grad():
        deformable.offset.bias[1:18:2] = 1.0
        deformable.offset.bias[18:] = 30.0
    shifted = conv(torch.nn.functional.pad(x, (0, 1))[..., 1:])
    torch.testing.assert_close(deformable(x)[..., 1:-1], shifted[..., 1:-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_deformable_convolutions_in_other_dtypes(dtype):
    torch.manual_seed(0)
    deformable = ModulatedDeformConv2d(nn.Conv2d(8, 8, 3, padding=1))
    x = torch.randn(1, 8, 6, 6)
    expected = deformable(x)
    if dtype != torch.float64:
        with torch.autocast("cpu", torch.bfloat16):
            assert deformable(x.to(dtype)).dtype == dtype
    out = copy.deepcopy(deformable).to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_deformable_stages_keep_the_weights_of_the_backbone(tmp_path):
    torch.manual_seed(0)
    body = resnet18(weights=None)
    torch.save(body.state_dict(), tmp_path / "body.pth")
    settings = SMALL | {"weights_backbone": tmp_path / "body.pth"}
    model = build_detector("atss", "resnet18", "fpn", **settings, deformable_stages=("c4", "c5"), deformable_head=True)
    found = [name for name, module in model.named_modules() if isinstance(module, ModulatedDeformConv2d)]
    expected = [f"backbone.body.layer{layer}.{block}.conv2" for layer in (3, 4) for block in (0, 1)]
    assert found == [*expected, "head.classification_head.conv.9", "head.regression_head.conv.9"]
    state = model.backbone.body.state_dict()
    kept = {name: value for name, value in state.items() if ".offset." not in name}
    assert len(state) == len(kept) + 8  # two per deformable convolution
    assert all(torch.equal(body.state_dict()[name], value) for name, value in kept.items())
    assert model.backbone.body.layer4[0].conv2.offset.weight.requires_grad
    model.eval()(images_and_targets()[0])


def test_unusable_deformable_stages_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"deformable stages must be a sequence of .*'c5'.* got \('c6',\)"):
        build_detector("atss", "resnet18", **SMALL, deformable_stages=("c6",))
    with pytest.raises(ValueError, match="got 'c5'"):
        make_stages_deformable_(resnet18(weights=None), "c5")
    torch.save(resnet18(weights=None).state_dict(), tmp_path / "body.pth")
    with pytest.raises(ValueError, match=r"deformable stages \['c3'\] would be frozen.*trainable_backbone_layers=2"):
        settings = SMALL | {"weights_backbone": tmp_path / "body.pth"}
        build_detector("atss", "resnet18", **settings, trainable_backbone_layers=2, deformable_stages=("c3", "c5"))
    with pytest.raises(ValueError, match="pads with zeros"):
        ModulatedDeformConv2d(nn.Conv2d(2, 2, 3, padding="same"))


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neck", ["fpn", "ifpn"])
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_has_a_gradient_with_and_without_objects(model, neck):
    made = make_model(model, neck, deformable_head=True)
    assert isinstance(made, FCOS)
    for empty in (False, True):
        made.zero_grad()
        losses = made(*images_and_targets(empty=empty))
        sum(losses.values()).backward()
        assert len(losses) == 3 and all(loss.dim() == 0 and loss.isfinite() for loss in losses.values())
        for name, parameter in made.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("neck", ["fpn", "ifpn"])
@pytest.mark.parametrize("model", MODELS)
def test_training_under_bfloat16_autocast(model, neck):
    # Not smaller: on maps of one column PyTorch's gradient of a convolution with stride 2 is garbage in bfloat16.
    made = make_model(model, neck, size=192, deformable_head=True)
    batch = images_and_targets(192)
    gradients = []
    for enabled in (False, True):
        made.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = made(*batch)
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        sum(losses.values()).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in made.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.parametrize("model", MODELS)
def test_a_seed_fixes_a_training_and_copies_go_on_alike(model):
    def train(made):
        optimizer = torch.optim.SGD(made.parameters(), lr=0.01)
        values = []
        for _ in range(3):
            loss = sum(made(*images_and_targets()).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values

    made = make_model(model, seed=5)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    loaded = make_model(model, seed=6)
    loaded.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    copies = [make_model(model, seed=5), copy.deepcopy(made), pickle.loads(pickle.dumps(made)), loaded]
    values = train(made)
    assert values[0] != values[1]
    assert all(train(twin) == values for twin in copies)


@pytest.mark.parametrize("model", MODELS)
def test_inference_is_deterministic_and_of_each_image_alone(model):
    made = make_model(model, score_thresh=0.0).eval()
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    with torch.no_grad():
        first, second, alone = made(images), made(images), [made([image])[0] for image in images]
    for a, b, c in zip(first, second, alone, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert len(a["boxes"]) > 0 and a["labels"].max() < 4
        torch.testing.assert_close(a["scores"], c["scores"])
        assert (a["scores"].diff() <= 0).all() and a["boxes"].min() >= 0 and a["boxes"].max() <= 64


@pytest.mark.parametrize("model", MODELS)
def test_a_few_images_are_learnt(model):
    """The losses fall: the parts fit together."""
    made = make_model(model)
    images, targets = images_and_targets()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = sum(made(images, targets).values())
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert max(values[-5:]) < 0.6 * values[0]
