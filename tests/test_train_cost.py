"""The cost benchmark: memory to the byte, calls of G that agree with the MACs, and options that are refused."""

import csv
import json
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from benchmark_modules import benchmark_modules
from checkpoints import write_checkpoint, write_image

from adapters.detection.cost import noise
from adapters.detection.training import DetectorConfig

NAMES = ("peak_memory", "detector_cost", "cost_report", "train_cost")


@pytest.fixture(scope="module")
def modules():
    """The modules of the benchmark."""
    with benchmark_modules(*NAMES) as found:
        yield SimpleNamespace(**found)


def subject(modules, variant, detector="retinanet", size=64, images=1, channels=32, setting=None, **settings):
    config = DetectorConfig(4, "fpn", detector, neck_channels=channels, image_size=size, head_norm=False, **settings)
    images, setting = noise(images, size, size, "cpu"), setting or modules.detector_cost.Setting()
    return modules.detector_cost.Subject(config, variant, images, seed=0, setting=setting)


def test_peaks_are_counted_to_the_byte(modules):
    megabyte = 2**20
    before = [torch.ones(megabyte, dtype=torch.uint8)]

    def double(kept):
        before.clear()  # what was there before does not count, nor that it goes
        more = torch.full((3 * megabyte,), 1, dtype=torch.uint8)
        del more
        kept.append(torch.full((megabyte,), 1, dtype=torch.uint8))

    peaks = modules.peak_memory.peak_tensor_bytes(
        torch.device("cpu"), lambda: [torch.empty(2 * megabyte, dtype=torch.uint8)], double, len, double
    )
    assert [round(peak / megabyte, 3) for peak in peaks] == [5, 3, 6]


def test_what_an_operator_takes_inside_is_seen(modules):
    x = torch.rand(1000, 1000)
    (peak,) = modules.peak_memory.peak_tensor_bytes(torch.device("cpu"), lambda: x, lambda x: (x @ x.T).sort(0))
    assert peak >= 3 * 4e6  # product, values, and more than the values for the indices


EXPECTED = {
    "unroll-2": (2, 2, 2),
    "neumann": (None, 3, 1),
    "fast": (None, 2, 1),
    "phantom": (None, 5, 5),
    "paper": (17, 17, 1),
}


def test_calls_agree_with_macs(modules):
    """A product costs as much as an evaluation, and so do the gradients of the weights: the MACs must say the same."""
    _, explicit = subject(modules, "fpn").count("train_step")
    _, explicit_inference = subject(modules, "fpn").count("infer")
    outputs = sum(explicit_inference[f"backbone.fpn.layer_blocks.{i}"] for i in range(3))
    for name in ("unroll-2", "neumann", "phantom", "fast", "accurate", "paper"):
        s = subject(modules, name)
        infer, inference_macs = s.count("infer")
        train, macs = s.count("train_step")
        g = inference_macs["backbone.fpn.module"] / infer.forward
        found = (macs[""] - explicit[""] + 3 * outputs) / g
        assert train.equivalents - 1e-6 <= found <= 1.04 * train.equivalents  # the solver has products of its own
        if name in EXPECTED:
            calls = (train.forward, train.backward, train.weights)
            assert all(e in (None, c) for e, c in zip(EXPECTED[name], calls, strict=True))
        if name in ("accurate", "paper"):
            stats = s.neck.last_solution.adjoint_stats
            assert train.backward == stats.num_fn_evals + 1 and train.adjoint_steps == stats.num_steps.double().mean()
    assert (infer.forward, infer.steps, infer.backward) == (8, 7.0, 0)  # of "paper"
    assert infer.converged != infer.converged  # it has no tolerance to meet


def test_memory_is_flat_but_for_unrolling(modules):
    """One evaluation of G is kept whatever the number of steps; a history is full after so many as it holds."""
    frozen = {"frozen_norm": True, "trainable_backbone_layers": 0}  # else its weights' momentum would be most of it
    growth = {}
    for name, steps in (("unroll-2", (4, 12)), ("fast", (4, 12)), ("accurate", (4, 12)), ("paper", (16, 24))):
        s = subject(modules, name, size=128, **frozen)
        before, after = (s.peak_of_training(k) for k in steps)
        growth[name] = after - before
    state = 32 * 4 * sum((128 // 2**level) ** 2 for level in range(3, 8))
    assert growth["fast"] == growth["accurate"] == 0
    assert growth["paper"] <= 2 * state  # the step with which its history is full
    assert growth["unroll-2"] > 8 * 2 * state  # several maps per evaluation


def test_steps_are_those_asked_for(modules):
    for name, calls in (("unroll-2", 5), ("fast", 7), ("accurate", 7), ("paper", 7)):
        s = subject(modules, name)
        counted, _ = s.copy(5).count("train_step")
        assert counted.forward == calls and (name == "unroll-2" or counted.steps == 5)
        assert name in ("unroll-2", "fast") or counted.adjoint_steps == 5
        assert s.neck.unroll in (None, 2) and s.neck.max_steps != 5  # the original is left as it was
    assert subject(modules, "neumann").copy(5).neck.adjoint.num_terms == 3


def test_settings_are_those_asked_for(modules):
    """The explicit FPN knows of the memory format alone."""
    setting = modules.detector_cost.Setting(channels_last=True, autocast="bfloat16", compiled=True)
    assert str(setting) == "channels_last, G in bfloat16, G compiled" and not str(modules.detector_cost.Setting())
    for name in ("fast", "fpn"):
        s, steps = subject(modules, name, setting=setting), []
        s.train_step, s.infer = partial(steps.append, "train"), partial(steps.append, "infer")
        s.compile()
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in s.model.parameters() if p.dim() == 4)
        if name == "fast":
            assert s.neck.module.autocast == torch.bfloat16 and s.neck.transform._compiled_call_impl is not None
            assert steps == ["train", "infer"] and s.copy().neck.transform._compiled_call_impl is None
        else:
            assert not steps and s.neck._compiled_call_impl is None
    assert subject(modules, "fast").neck.module.autocast is None


def test_a_step_changes_no_weight(modules):
    s = subject(modules, "fast")
    before = {name: value.detach().clone() for name, value in s.model.named_parameters()}
    s.train_step()
    s.infer()
    assert all(torch.equal(value, before[name]) for name, value in s.model.named_parameters())


@pytest.mark.parametrize("variant", ["fpn", "fast"])
def test_the_time_of_the_neck_is_its_own(modules, variant):
    """Sleeps inside the neck count as the neck's, forward and backward, those of the head do not."""
    s = subject(modules, variant)
    lateral, tower = s.neck.inner_blocks[0], s.model.head.classification_head.cls_logits

    def slow(seconds):
        def hook(module, args, output):
            time.sleep(seconds)
            if output.requires_grad:
                output.register_hook(lambda gradient: time.sleep(seconds))

        return hook

    lateral.register_forward_hook(slow(0.1))
    tower.register_forward_hook(slow(0.05))  # of five levels
    train, infer = s.lap("train_step"), s.lap("infer")
    assert train.neck >= 0.2 and train.seconds - train.neck >= 10 * 0.05
    assert infer.neck >= 0.1 and infer.seconds - infer.neck >= 5 * 0.05


@pytest.mark.parametrize("detector", ["fasterrcnn", "fcos_paper", "atss", "autoassign"])
def test_every_detector(modules, detector):
    s = subject(modules, "fast", detector)
    calls, macs = s.count("train_step")
    assert calls.forward > 1 and calls.converged == 1.0 and macs[""] > 0
    assert 0 < s.lap("train_step").neck


def test_a_run(modules, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--quick", "--rounds", "1", "--neck", "paper", "--steps", "2,4", "--out", str(out), "--device", "cpu"]
    arguments += ["--channels-last"]
    rows, by_steps = modules.train_cost.main(arguments)
    assert [(row.neck, row.image_size) for row in rows] == [("fpn", 64), ("paper", 64)]
    explicit, paper = rows
    assert explicit.train_ratio == explicit.infer_ratio == explicit.memory_ratio == explicit.train_mac_ratio == 1
    assert paper.train_mac_ratio > paper.infer_mac_ratio > 1 and paper.memory_ratio > 1
    assert (paper.forward_calls, paper.backward_calls, paper.infer_calls, explicit.forward_calls) == (17, 17, 8, 0)
    assert all(0 < share < 1 for row in rows for share in (row.train_neck_share, row.infer_neck_share))
    assert [(row.neck, row.steps) for row in by_steps] == [("paper", 2), ("paper", 4)]
    printed = capsys.readouterr().out
    assert explicit.train_processor_ratio == 1 and paper.train_processor_ratio > 0 and paper.infer_processor_ratio > 0
    how = "channels_last"
    assert f"cpu, random weights, {how}: training step, paper / FPN" in printed and "Calls of G" in printed
    assert explicit.setting == paper.setting == how
    assert (explicit.weights, paper.equivalents) == ("random weights", 35)
    assert {path.name for path in out.iterdir()} == {
        "train_cost.csv", "memory.csv", "train_cost.json", "train_cost.png",
    }  # fmt: skip
    record = json.loads((out / "train_cost.json").read_text())
    assert record["seed"] == 0 and record["verdicts"] and record["settings"]["rounds"] == 1
    assert record["settings"]["channels_last"] and record["settings"]["autocast"] is None
    with (out / "train_cost.csv").open() as file:
        assert [line["neck"] for line in csv.DictReader(file)] == ["fpn", "paper"]


def test_a_trained_detector(modules, tmp_path):
    """Its weights and its design of G are measured, not those of the recipes."""
    checkpoint = write_checkpoint(tmp_path / "a.ckpt", neck_settings={"rtol": 1e-3, "cross_scale": "dense"})
    write_image(tmp_path / "photos" / "a.png")
    arguments = ["--checkpoint", str(checkpoint), "--pictures", str(tmp_path / "photos"), "--images", "1"]
    args = modules.train_cost.parse_arguments(arguments)
    ((detector, config),) = args.plan
    s = modules.detector_cost.Subject(config, "fast", args.batch, 0, args.weights)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert detector == "retinanet" and "DenseConnection" in repr(s.neck) and s.neck.rtol == 0.15
    assert all(torch.equal(value, saved[f"model.{name}"]) for name, value in s.model.state_dict().items())
    explicit = modules.detector_cost.Subject(config, "fpn", args.batch, 0, args.weights)
    own = explicit.model.state_dict()
    assert all(torch.equal(own[name], saved[f"model.{name}"]) for name in own if "backbone.fpn." not in name)
    assert s.count("infer")[0].forward >= 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--detector", "yolo"], "autoassign"),
        (["--neck", "bifpn"], "unroll-2"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--images", "0"], "--images must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--image-size", "16"], "--image-size must be at least 32, got 16"),
        (["--steps", "0-4"], "the least is 1"),
        (["--steps", "few"], "not a list of step counts"),
        (["--all", "--detector", "atss"], "either --all or --detector"),
        (["--checkpoint", "none.ckpt"], "checkpoint not found: none.ckpt"),
        (["--checkpoint", "none.ckpt", "--all"], "brings its own detector"),
        (["--pictures", "nowhere"], "nowhere"),
        (["--out", __file__], "is no folder"),
    ],
)
def test_bad_options_are_refused_before_anything_is_computed(modules, monkeypatch, capsys, words, message):
    monkeypatch.setattr(modules.train_cost, "run", lambda *args: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as stopped:
        modules.train_cost.main(words)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_too_few_pictures_and_an_explicit_checkpoint_are_refused(modules, tmp_path, capsys):
    write_image(tmp_path / "a.png")
    for words, message in (
        (["--pictures", str(tmp_path / "a.png"), "--images", "2"], "1 images that can be read, --images asks for 2"),
        (["--checkpoint", str(write_checkpoint(tmp_path / "fpn.ckpt", "fpn"))], "the neck 'fpn'"),
    ):
        with pytest.raises(SystemExit):
            modules.train_cost.main(words)
        assert message in capsys.readouterr().err


def rows_of(modules, **changes):
    """Rows of RetinaNet with ResNet-50, the explicit one and two implicit ones."""
    fields = dict.fromkeys(modules.train_cost.Row.__dataclass_fields__, 1)
    first = modules.train_cost.Row(**{**fields, "detector": "retinanet", "backbone": "resnet50", "neck": "fpn"})
    first = replace(first, image_size=320, device="cpu")
    return [first, *(replace(first, neck=neck, **changes) for neck in ("fast", "paper"))]


def test_verdicts(modules):
    report, step_row = modules.cost_report, modules.train_cost.StepRow

    def by_steps(memory):
        return [step_row("retinanet", "fast", 320, "cpu", k, m, m / 100) for k, m in memory]

    rows = rows_of(modules, train_ratio=2.0, infer_ratio=1.5, memory_ratio=1.3)
    lines = "\n".join(report.verdicts(rows, by_steps([(4, 110), (8, 111), (16, 111)])))
    assert "training step, fast / FPN: 2.00 (target 1.5: not met)" in lines
    assert "training step, paper / FPN: 2.00 (target 3.3: met)" in lines
    assert "fast, 1.0 steps: 1.50 (target 1.6: met)" in lines
    assert "training memory, fast / FPN: 1.30 (target 1.2: not met)" in lines
    assert "flat: 16 steps take 1.000 times the memory of 8; at most 1.11 (target 1.2: met)" in lines
    assert "grows: 16 steps take 1.207" in "\n".join(report.verdicts(rows, by_steps([(8, 111), (16, 134)])))
    other = [replace(row, backbone="resnet18") for row in rows]
    assert "(no target)" in "\n".join(report.verdicts(other, [])) and "met" not in "".join(report.verdicts(other, []))


def test_the_ratio_at_full_size_is_that_of_the_recipes(modules):
    """Calls of G as `sizing` counts them give its own table, one more adds one evaluation."""
    t = modules.train_cost
    calls = modules.detector_cost.Calls(forward=t.RECIPES_CALLS)
    counted = {
        name: t.Counted(replace(calls, forward=calls.forward + more), {}, calls, {})
        for name, more in (("fpn", 0), ("paper", 0), ("fast", 1))
    }
    found = t.full_mac_ratios("t1_retinanet", counted)
    assert found["fpn"] == 1 and found["paper"] == pytest.approx(2295 / 716, rel=1e-3)
    assert found["fast"] - found["paper"] == pytest.approx(46.2 / 716, rel=2e-3)
