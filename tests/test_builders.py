import warnings

import pytest
import torch
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.models.detection import RetinaNet
from torchvision.models.detection import retinanet_resnet50_fpn as torchvision_retinanet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d

from adapters.detection import (
    ImplicitFPN,
    retinanet_resnet18_fpn,
    retinanet_resnet18_ifpn,
    retinanet_resnet50_fpn,
    retinanet_resnet50_ifpn,
)

SMALL = {"weights_backbone": None, "num_classes": 4, "neck_channels": 32, "min_size": 64, "max_size": 64}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def seeded(builder, *args, seed=7, **kwargs):
    torch.manual_seed(seed)
    return builder(*args, **kwargs)


def backbone_file(tmp_path, **changes):
    path = tmp_path / "resnet18.pth"
    state = resnet18(weights=None, num_classes=10).state_dict()
    torch.save({k: v for k, v in (state | changes).items() if v is not None}, path)
    return path


@pytest.mark.parametrize(
    ("explicit", "implicit", "settings"),
    [
        (retinanet_resnet18_fpn, retinanet_resnet18_ifpn, SMALL),
        (retinanet_resnet50_fpn, retinanet_resnet50_ifpn, SMALL),
        (retinanet_resnet18_fpn, retinanet_resnet18_ifpn, {"weights_backbone": None}),
    ],
)
def test_twins_differ_in_the_neck_only(explicit, implicit, settings):
    a, b = seeded(explicit, **settings), seeded(implicit, **settings)
    assert isinstance(a, RetinaNet) and isinstance(b, RetinaNet)
    assert isinstance(a.backbone.fpn, FeaturePyramidNetwork) and isinstance(b.backbone.fpn, ImplicitFPN)
    own_a, own_b = "backbone.fpn.layer_blocks.", "backbone.fpn.module.transform."
    state_a, state_b = a.state_dict(), b.state_dict()
    shared = [k for k in state_a if not k.startswith(own_a)]
    assert shared == [k for k in state_b if not k.startswith(own_b)]
    assert all(torch.equal(state_a[k], state_b[k]) for k in shared)
    trained = [{k for k, p in m.named_parameters() if p.requires_grad and k in shared} for m in (a, b)]
    assert trained[0] == trained[1]
    width = settings.get("neck_channels", 256)
    count_a = sum(p.numel() for k, p in a.named_parameters() if k.startswith(own_a))
    count_b = sum(p.numel() for k, p in b.named_parameters() if k.startswith(own_b))
    assert count_a == 3 * (9 * width**2 + width)
    assert count_b == 5 * (2 * 9 * width**2 + 4 * width) + 3 * (9 * width**2 + width)
    assert b.backbone.fpn.extra_in_state and b.backbone.fpn.extra_blocks.use_P5
    assert a.training and b.training


def test_the_explicit_twin_is_torchvisions_model():
    settings = {"weights_backbone": None, "num_classes": 5, "score_thresh": 0.2}
    ours = seeded(retinanet_resnet50_fpn, **settings)
    theirs = seeded(torchvision_retinanet, weights=None, **settings)
    assert str(ours) == str(theirs)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
    assert ours.score_thresh == theirs.score_thresh == 0.2


@pytest.mark.parametrize("builder", [retinanet_resnet18_ifpn, retinanet_resnet18_fpn])
def test_training_step_and_inference_from_scratch(builder):
    model = builder(**SMALL)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in model.modules())
    images = [torch.rand(3, 64, 64), torch.rand(3, 50, 64)]
    targets = [
        {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    sum(model(images, targets).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.eval()
    with torch.no_grad():
        detections = model(images)
    assert [set(d) for d in detections] == [{"boxes", "scores", "labels"}] * 2


def test_neck_settings_and_retinanet_arguments_arrive():
    sizes = tuple((s,) for s in (16, 32, 64, 128, 256))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0),) * 5)
    model = retinanet_resnet18_ifpn(
        **SMALL,
        neck_settings={"solver": "broyden", "max_steps": 9, "share_rbl": True},
        anchor_generator=anchors,
        score_thresh=0.3,
        size_divisible=16,
    )
    neck = model.backbone.fpn
    assert (neck.solver, neck.max_steps, len(neck.transform.residual_blocks)) == ("broyden", 9, 1)
    assert model.anchor_generator is anchors and model.score_thresh == 0.3
    assert model.transform.size_divisible == 16 and model.transform.min_size == (64,)
    assert model.head.classification_head.cls_logits.out_channels == 2 * 4
    assert model.backbone.out_channels == neck.out_channels == 32


def test_unknown_arguments_are_refused_by_name():
    with pytest.raises(TypeError, match=r"'mn_size', 'scorethresh'; accepted: .*min_size.*score_thresh"):
        retinanet_resnet18_fpn(**SMALL, scorethresh=0.1, mn_size=3)
    with pytest.raises(TypeError, match="'backbone'"):
        retinanet_resnet18_ifpn(**SMALL, backbone=nn.Identity())
    with pytest.raises(TypeError, match="max_iter"):
        retinanet_resnet18_ifpn(**SMALL, neck_settings={"max_iter": 3})
    with pytest.raises(TypeError, match="neck_settings"):
        retinanet_resnet18_fpn(**SMALL, neck_settings={})


def test_local_backbone_weights_freeze_like_torchvision(tmp_path):
    path = backbone_file(tmp_path)
    state = torch.load(path, weights_only=True)
    settings = SMALL | {"weights_backbone": path}
    model = retinanet_resnet18_ifpn(**settings)
    body = model.backbone.body
    assert torch.equal(body.conv1.weight, state["conv1.weight"])
    assert isinstance(body.bn1, FrozenBatchNorm2d)
    frozen = {k.split(".")[0] for k, p in body.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}
    model = retinanet_resnet18_fpn(
        **(settings | {"weights_backbone": str(path)}), trainable_backbone_layers=5, norm_layer=nn.BatchNorm2d
    )
    assert all(p.requires_grad for p in model.parameters())
    assert isinstance(model.backbone.body.bn1, nn.BatchNorm2d)
    with pytest.raises(ValueError, match="0 to 5, got 6"):
        retinanet_resnet18_fpn(**settings, trainable_backbone_layers=6)


def test_backbone_weights_by_name(monkeypatch):
    state = resnet18(weights=None).state_dict()
    asked = []

    def get_state_dict(self, *args, **kwargs):
        asked.append(self)
        return dict(state)

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", get_state_dict)
    for weights in ("DEFAULT", "ResNet18_Weights.IMAGENET1K_V1", ResNet18_Weights.IMAGENET1K_V1):
        model = retinanet_resnet18_ifpn(**(SMALL | {"weights_backbone": weights}))
        assert torch.equal(model.backbone.body.conv1.weight, state["conv1.weight"])
    del model
    retinanet_resnet18_fpn(**{k: v for k, v in SMALL.items() if k != "weights_backbone"})
    assert asked == [ResNet18_Weights.IMAGENET1K_V1] * 4


def test_bad_backbone_weights_are_named(tmp_path):
    def build(weights):
        return retinanet_resnet18_ifpn(**(SMALL | {"weights_backbone": weights}))

    with pytest.raises(FileNotFoundError, match="'IMAGENET1K_V3'.*IMAGENET1K_V1"):
        build("IMAGENET1K_V3")
    with pytest.raises(TypeError, match="weights_backbone must be a path"):
        build(True)
    with pytest.raises(ValueError, match=r"does not fit resnet18: missing \['conv1.weight'\]"):
        build(backbone_file(tmp_path, **{"conv1.weight": None}))
    with pytest.raises(ValueError, match=r"unexpected \['neck.weight'\]"):
        build(backbone_file(tmp_path, **{"neck.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match="(?s)does not fit resnet18.*conv1.weight"):
        build(backbone_file(tmp_path, **{"conv1.weight": torch.zeros(3)}))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no state dict"):
        build(tmp_path / "list.pth")


def test_trainable_layers_from_scratch_are_all():
    with pytest.warns(UserWarning, match="trainable_backbone_layers=2 is ignored"):
        model = retinanet_resnet18_fpn(**SMALL, trainable_backbone_layers=2)
    assert all(p.requires_grad for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        retinanet_resnet18_fpn(**SMALL, trainable_backbone_layers=5)


@pytest.mark.parametrize("wrap", [False, True])
def test_detector_weights_from_a_file(tmp_path, wrap):
    model = retinanet_resnet18_ifpn(**SMALL)
    path = tmp_path / "detector.pth"
    torch.save({"model": model.state_dict(), "epoch": 3} if wrap else model.state_dict(), path)
    settings = {k: v for k, v in SMALL.items() if k not in ("num_classes", "weights_backbone")}
    # The default weights of the backbone are not fetched, and the number of classes is that of the file.
    loaded = retinanet_resnet18_ifpn(weights=path, **settings)
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    images = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        a, b = model.eval()(images), loaded.eval()(images)
    torch.testing.assert_close(a[0]["scores"], b[0]["scores"], rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="num_classes=7, but the weights are for 4 classes"):
        retinanet_resnet18_ifpn(weights=path, num_classes=7, **settings)
    with pytest.raises(ValueError, match="weights are those of an implicit FPN"):
        retinanet_resnet18_fpn(weights=path, **settings)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        retinanet_resnet18_ifpn(weights="nowhere.pth", **settings)
    with pytest.raises(TypeError, match="weights must be a path"):
        retinanet_resnet18_ifpn(weights=3, **settings)


def test_weights_of_the_other_neck_are_refused(tmp_path):
    path = tmp_path / "detector.pth"
    torch.save(retinanet_resnet18_fpn(**SMALL).state_dict(), path)
    with pytest.raises(ValueError, match="explicit FPN.*convert_fpn_"):
        retinanet_resnet18_ifpn(weights=path, neck_channels=32)
