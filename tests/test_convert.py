import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import (
    FCOS,
    FasterRCNN,
    KeypointRCNN,
    MaskRCNN,
    RetinaNet,
    fasterrcnn_resnet50_fpn,
    fcos_resnet50_fpn,
    keypointrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
)
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from adapters.detection import ImplicitFPN, convert_fpn_

CHANNELS = [6, 10, 14]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_from_fpn_adopts_the_modules():
    fpn = FeaturePyramidNetwork(CHANNELS, 16, LastLevelP6P7(16, 16)).double().eval()
    kept = {k: v for k, v in fpn.state_dict().items() if not k.startswith("layer_blocks")}
    neck = ImplicitFPN.from_fpn(fpn, max_steps=40)
    x = {str(j): torch.randn(2, c, 8 >> j, 9 >> j, dtype=torch.float64) for j, c in enumerate(CHANNELS)}
    assert neck.inner_blocks is fpn.inner_blocks and neck.extra_blocks is fpn.extra_blocks
    assert neck.max_steps == 40 and not neck.training and not neck.transform.residual_blocks[0].training
    state = neck.state_dict()
    assert {k for k in state if not k.startswith("module.transform.")} == set(kept)
    assert all(state[k].data_ptr() == kept[k].data_ptr() for k in kept)
    assert all(v.dtype == torch.float64 for v in state.values())
    assert all(v.dtype == torch.float64 for v in neck(x).values())
    with pytest.raises(TypeError, match="Linear"):
        ImplicitFPN.from_fpn(nn.Linear(2, 2))


def small_backbone(extra, width=64):
    """ResNet-18 with live BatchNorm and a narrow pyramid: torchvision's models at a test's size."""
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    channels = [128, 256, 512]
    if extra is None:
        layers, channels = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}, [64, *channels]
    return BackboneWithFPN(resnet18(weights=None), layers, channels, width, extra_blocks=extra)


SIZE = {"min_size": 64, "max_size": 64}
RCNN = SIZE | {"box_batch_size_per_image": 8, "rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20}
DETECTORS = {
    "retinanet": lambda: RetinaNet(small_backbone(LastLevelP6P7(64, 64)), 4, **SIZE),
    "fcos": lambda: FCOS(small_backbone(LastLevelP6P7(64, 64)), 4, **SIZE),
    "faster": lambda: FasterRCNN(small_backbone(None), 4, **RCNN),
    "mask": lambda: MaskRCNN(small_backbone(None), 4, **RCNN),
    "keypoint": lambda: KeypointRCNN(small_backbone(None), 2, num_keypoints=3, **RCNN),
}


def batch_of_targets():
    boxes = torch.tensor([[6.0, 8.0, 40.0, 50.0], [20.0, 4.0, 60.0, 30.0]])
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    points = torch.tensor([[[10.0, 12, 1], [20, 20, 1], [30, 40, 1]], [[25.0, 10, 1], [40, 20, 1], [50, 25, 1]]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 1]), "masks": masks, "keypoints": points}
    return [torch.rand(3, 64, 64), torch.rand(3, 48, 64)], [target, {k: v.clone() for k, v in target.items()}]


@pytest.mark.parametrize("name", DETECTORS)
def test_convert_every_detector_and_train(name):
    model = DETECTORS[name]()
    fpn = model.backbone.fpn
    settings = {"preset": "accurate", "solver": "anderson", "max_steps": 40}
    assert convert_fpn_(model, **settings) is model
    neck = model.backbone.fpn
    assert isinstance(neck, ImplicitFPN) and neck.inner_blocks is fpn.inner_blocks and neck.training
    images, targets = batch_of_targets()
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert neck.last_solution.converged.all() and neck.last_solution.adjoint_stats.converged.all()
    for part, parameter in model.backbone.named_parameters():
        if part.startswith(("body.fc", "fpn.layer_blocks")):
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), part
        assert parameter.grad.any() or part.endswith("bias"), part
    model.eval()
    with torch.no_grad():
        detections = model(images)
    assert len(detections) == 2 and all(d["boxes"].isfinite().all() for d in detections)
    with pytest.raises(ValueError, match="already has an ImplicitFPN at 'backbone.fpn'"):
        convert_fpn_(model)


@pytest.mark.parametrize(
    "builder",
    [
        retinanet_resnet50_fpn,
        fcos_resnet50_fpn,
        fasterrcnn_resnet50_fpn,
        maskrcnn_resnet50_fpn,
        keypointrcnn_resnet50_fpn,
    ],
)
def test_convert_the_models_of_torchvisions_builders(builder):
    with torch.device("meta"):  # structure only: no memory, no time
        model = builder(weights=None, weights_backbone=None)
    before = {k for k in model.state_dict() if ".fpn.layer_blocks." not in k}
    keys = list(model.backbone.fpn.state_dict())
    convert_fpn_(model)
    after = model.state_dict()
    assert before == {k for k in after if ".fpn.module.transform." not in k}
    assert all(v.is_meta for v in after.values())
    assert any("layer_blocks" in k for k in keys)
    assert model.backbone.fpn.num_levels == (5 if model.backbone.fpn.extra_in_state else 4)


def test_convert_refuses_what_it_cannot_convert():
    with pytest.raises(ValueError, match="no torchvision FeaturePyramidNetwork"):
        convert_fpn_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="from_fpn"):
        convert_fpn_(FeaturePyramidNetwork(CHANNELS, 8))
    two = nn.ModuleList([FeaturePyramidNetwork(CHANNELS, 8) for _ in range(2)])
    with pytest.raises(ValueError, match=r"several.*'0', '1'"):
        convert_fpn_(two)
    model = nn.ModuleDict({"fpn": FeaturePyramidNetwork(CHANNELS, 8)})
    with pytest.raises(TypeError, match="steps"):
        convert_fpn_(model, steps=3)
    assert isinstance(model["fpn"], FeaturePyramidNetwork)
