"""`build_detector`: every detector on every backbone with both necks, and the names of the usual combinations."""

import inspect
import pickle

import pytest
import torch
import torchvision.models.detection as theirs
from torch import nn
from torchvision.models import ResNet50_Weights
from torchvision.models.detection import FasterRCNN
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FeaturePyramidNetwork

import adapters.detection as ours
from adapters.detection import ATSS, ImplicitFPN, ModulatedDeformConv2d, build_detector, builders

SMALL = {"weights_backbone": None, "num_classes": 4, "neck_channels": 32, "min_size": 64, "max_size": 64}
QUIET = {"neck_settings": {"on_failure": "ignore"}}
NAMED = [name for name in builders.__all__ if name.endswith("fpn")]


def on_meta(*args, **kwargs):
    with torch.device("meta"):  # structure only: no memory, no time
        return build_detector(*args, **({"weights_backbone": None} | kwargs))


def images_and_targets():
    torch.manual_seed(1)
    boxes = torch.tensor([[5.0, 5, 40, 40], [10, 10, 60, 60]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 1]), "masks": torch.ones(2, 64, 64, dtype=torch.uint8)}
    target["keypoints"] = torch.tensor([[[20.0, 20, 1], [30, 30, 1]]]).repeat(2, 1, 1)
    return [torch.rand(3, 64, 64), torch.rand(3, 48, 64)], [target, {k: v.clone() for k, v in target.items()}]


@pytest.mark.parametrize("detector", ["retinanet", "fcos", "fasterrcnn", "maskrcnn", "keypointrcnn"])
def test_with_the_explicit_fpn_it_is_the_model_of_torchvision(detector):
    with torch.device("meta"):
        expected = getattr(theirs, f"{detector}_resnet50_fpn")(weights=None, weights_backbone=None)
    found = on_meta(detector, "resnet50", "fpn")
    assert str(found) == str(expected) and type(found) is type(expected)
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (found, expected)]
    assert shapes[0] == shapes[1]
    for name in ("score_thresh", "nms_thresh", "topk_candidates", "detections_per_img", "center_sampling_radius"):
        assert getattr(found, name, None) == getattr(expected, name, None)


def test_a_seed_draws_what_torchvision_draws():
    settings = {"weights_backbone": None, "num_classes": 5}
    torch.manual_seed(3)
    found = ours.fasterrcnn_resnet50_fpn(**settings).state_dict()
    torch.manual_seed(3)
    expected = theirs.fasterrcnn_resnet50_fpn(weights=None, **settings).state_dict()
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("detector", "backbone"),
    [(detector, "resnet18") for detector in builders.DETECTORS] + [("atss", name) for name in builders.BACKBONES],
)
def test_every_detector_and_every_backbone_has_twins(detector, backbone):
    explicit, implicit = on_meta(detector, backbone, "fpn"), on_meta(detector, backbone, "ifpn")
    assert isinstance(explicit.backbone.fpn, FeaturePyramidNetwork)
    neck = implicit.backbone.fpn
    assert isinstance(neck, ImplicitFPN)
    own = ("backbone.fpn.layer_blocks.", "backbone.fpn.module.transform.")
    shared = [[name for name in model.state_dict() if not name.startswith(own)] for model in (explicit, implicit)]
    assert shared[0] == shared[1]
    is_rcnn = detector.endswith("rcnn")
    # P6 and P7 are solved for, the subsampled P6 of an R-CNN is made afterwards.
    assert neck.extra_in_state != is_rcnn and neck.transform.num_levels == (4 if is_rcnn else 5)
    if not is_rcnn:
        assert neck.extra_blocks.use_P5
    widths = {"resnet18": 512, "resnet34": 512}
    assert neck.in_channels_list[-1] == widths.get(backbone, 2048) and len(neck.in_channels_list) == (
        4 if is_rcnn else 3
    )


def test_the_levels_of_the_necks():
    for detector, names in (("atss", ["0", "1", "2", "p6", "p7"]), ("fasterrcnn", ["0", "1", "2", "3", "pool"])):
        for neck in ("fpn", "ifpn"):
            model = build_detector(detector, "resnet18", neck, **SMALL, **(QUIET if neck == "ifpn" else {}))
            maps = model.backbone(torch.rand(1, 3, 64, 96))
            assert list(maps) == names
            finest = 4 if detector == "fasterrcnn" else 8
            sizes = [(-(-64 // (finest << level)), -(-96 // (finest << level))) for level in range(5)]
            assert [tuple(m.shape[-2:]) for m in maps.values()] == sizes


def test_the_large_resnext():
    body = on_meta("atss", "resnext152_32x8d").backbone.body
    assert [len(body[f"layer{stage}"]) for stage in (1, 2, 3, 4)] == [3, 8, 36, 3]
    conv = body["layer3"][0].conv2
    assert isinstance(body["layer3"][0], Bottleneck) and conv.groups == 32 and conv.out_channels == 4 * 32 * 8
    assert on_meta("atss", "resnext101_64x4d").backbone.body["layer1"][0].conv2.groups == 64
    with pytest.raises(FileNotFoundError, match="'IMAGENET1K_V1': no such file.*none are published"):
        build_detector("atss", "resnext152_32x8d")
    with pytest.raises(ValueError, match="no published weights"):
        ours.resnext152_32x8d(weights="DEFAULT")
    rows = on_meta("autoassign", "resnext152_32x8d", deformable_stages=("c4", "c5"), deformable_head=True)
    found = [module for module in rows.modules() if isinstance(module, ModulatedDeformConv2d)]
    assert len(found) == 36 + 3 + 2 and found[0].groups == 32 and found[-1].groups == 1


@pytest.mark.parametrize("name", NAMED)
def test_named_builders(name):
    builder = getattr(ours, name)
    detector, backbone, neck = name.rsplit("_", 2)
    assert builder.__name__ == name and f'"{detector}", "{backbone}", "{neck}"' in builder.__doc__
    assert pickle.loads(pickle.dumps(builder)) is builder
    signature = inspect.signature(builder)
    generic = inspect.signature(build_detector)
    assert list(signature.parameters) == [p for p in generic.parameters if p not in ("detector", "backbone", "neck")]
    default = signature.parameters["weights_backbone"].default
    assert default == type(default).IMAGENET1K_V1 and (backbone != "resnet50" or default in ResNet50_Weights)
    with torch.device("meta"):
        model = builder(weights_backbone=None, num_classes=7)
    assert type(model) is signature.return_annotation is builders.DETECTORS[detector].model
    assert isinstance(model.backbone.fpn, ImplicitFPN) == (neck == "ifpn")


def test_every_detector_has_its_names():
    assert {name.rsplit("_", 2)[0] for name in NAMED} == set(builders.DETECTORS)
    assert set(NAMED) <= set(ours.__all__)


@pytest.mark.parametrize("detector", builders.DETECTORS)
def test_every_detector_trains_and_detects(detector):
    settings = {"num_keypoints": 2, "num_classes": 2} if detector == "keypointrcnn" else {}
    if detector.endswith("rcnn"):  # few proposals, for the sake of time
        settings |= {"box_batch_size_per_image": 8, "rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 5}
    torch.manual_seed(0)
    model = build_detector(detector, "resnet18", **(SMALL | settings), **QUIET)
    images, targets = images_and_targets()
    sum(model(images, targets).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    with torch.no_grad():
        detections = model.eval()(images)
    assert all({"boxes", "scores", "labels"} <= set(detection) for detection in detections)


@pytest.mark.parametrize(("detector", "default"), [("autoassign", 91), ("fasterrcnn", 91), ("keypointrcnn", 2)])
def test_the_number_of_classes_is_that_of_the_weights(tmp_path, detector, default):
    settings = {name: value for name, value in SMALL.items() if name not in ("num_classes", "weights_backbone")}
    model = build_detector(detector, "resnet18", **SMALL, deformable_stages=("c5",))
    torch.save(model.state_dict(), tmp_path / "detector.pth")
    loaded = build_detector(
        detector, "resnet18", weights=tmp_path / "detector.pth", deformable_stages=("c5",), **settings
    )
    found, state = loaded.state_dict(), model.state_dict()
    # The backbone of a loaded detector has frozen statistics, which count no batches.
    kept = [name for name in state if not name.endswith("num_batches_tracked")]
    assert list(found) == kept and all(torch.equal(found[name], state[name]) for name in kept)
    with pytest.raises(ValueError, match="num_classes=9, but the weights are for 4 classes"):
        build_detector(detector, "resnet18", weights=tmp_path / "detector.pth", num_classes=9, **settings)
    bias = on_meta(detector).state_dict()[builders.DETECTORS[detector].classifier]
    assert len(bias) == default


def test_a_box_predictor_of_ones_own():
    predictor = theirs.faster_rcnn.FastRCNNPredictor(1024, 3)
    model = build_detector("fasterrcnn", "resnet18", weights_backbone=None, box_predictor=predictor)
    assert isinstance(model, FasterRCNN) and model.roi_heads.box_predictor is predictor


def test_arguments_arrive():
    points = ours.PointGenerator((8, 16, 32, 64, 120))
    model = build_detector(
        "atss", "resnet18", **SMALL, topk=5, anchor_scale=6.0, score_thresh=0.2, nms_thresh=0.5, detections_per_img=7,
        topk_candidates=11, anchor_generator=points, size_divisible=16, image_mean=[0.0, 0, 0], regression_weight=1.5,
    )  # fmt: skip
    assert isinstance(model, ATSS) and (model.topk, model.anchor_scale, model.head.regression_weight) == (5, 6.0, 1.5)
    assert (model.score_thresh, model.nms_thresh, model.detections_per_img, model.topk_candidates) == (0.2, 0.5, 7, 11)
    assert model.anchor_generator is points and model.transform.size_divisible == 16
    assert model.transform.image_mean == [0, 0, 0] and model.transform.min_size == (64,)
    head = nn.Identity()
    assert build_detector("autoassign", "resnet18", **SMALL, head=head).head is head


def test_unknown_names_and_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown detector 'yolo'; known: retinanet, fcos, .*atss"):
        build_detector("yolo")
    with pytest.raises(ValueError, match="unknown backbone 'vit'; known: resnet18, .*resnext152_32x8d"):
        build_detector("atss", "vit")
    with pytest.raises(ValueError, match="unknown neck 'pan'; known: fpn, ifpn"):
        build_detector("atss", "resnet18", "pan")
    with pytest.raises(TypeError, match="neck_settings are for the implicit FPN"):
        build_detector("atss", "resnet18", "fpn", neck_settings={})
    for detector, argument in (("fasterrcnn", "rpn"), ("atss", "center_sampling_radius"), ("autoassign", "topk")):
        with pytest.raises(TypeError, match=f"has no argument '{argument}'; accepted: .*min_size"):
            build_detector(detector, "resnet18", weights_backbone=None, **{argument: 1})
