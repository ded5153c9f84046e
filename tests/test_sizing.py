"""The sizing table: its counts are those of the operations, and the README has what it prints."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.ops import DeformConv2d

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import sizing  # noqa: E402


def test_macs_by_hand() -> None:
    conv, deformable, linear = nn.Conv2d(4, 6, 3, padding=1), DeformConv2d(6, 8, 3, padding=1), nn.Linear(8, 5)
    with sizing.Counter() as count:
        y = deformable(conv(torch.rand(2, 4, 5, 7)), torch.zeros(2, 18, 5, 7))
        linear(y.mean((2, 3)))
    assert count.total == 2 * 35 * 9 * (4 * 6 + 6 * 8) + 2 * 8 * 5


def test_what_autograd_keeps() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.rand(3, 8)
    with sizing.KeptForBackward(net) as kept:
        net(x)
    assert kept.bytes == 4 * (3 * 8 + 3 * 16)  # the input, and what tanh and the second layer share


def test_a_recipe_is_counted() -> None:
    explicit, implicit, unrolled = map(
        sizing.size_recipe, ("t1_retinanet_fpn", "t1_retinanet_ifpn", "t2_autoassign_unroll2")
    )
    assert implicit.g_macs == pytest.approx(46.2e9, rel=0.01)  # as measured on the convolutions by themselves
    assert unrolled.g_macs == pytest.approx(43.2e9, rel=0.01) and explicit.g_macs == 0
    # An i-FPN has no 3x3 output convolutions, G 35 times.
    fpn_outputs = sum(256 * 256 * 9 * (800 // s) * (1344 // s) for s in (8, 16, 32))
    assert implicit.step_macs - explicit.step_macs == pytest.approx(35 * implicit.g_macs - 3 * fpn_outputs, rel=1e-3)
    assert implicit.memory > explicit.memory and implicit.steps == 90000
    # Half the images keep half the activations and states; parameters stay.
    half = sizing.size_recipe("t1_retinanet_ifpn", images=1)
    assert half.step_macs == pytest.approx(implicit.step_macs)
    assert implicit.memory / 2 < half.memory < implicit.memory * 0.6


def test_the_readme_has_what_is_printed(capsys, monkeypatch) -> None:
    recipes = ["t1_retinanet_fpn", "t1_retinanet_ifpn"]
    monkeypatch.setattr(sys, "argv", ["sizing.py", "--markdown", "--recipes", *recipes])
    sizing.main()
    printed = capsys.readouterr().out.splitlines()
    readme = (ROOT / "README.md").read_text()
    assert printed[0].split(" per ")[0] in readme
    for line in printed[1:]:
        assert line in readme.splitlines()


def test_unknown_recipes_are_refused() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/sizing.py", "--recipes", "t9"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "unknown recipe 't9': choose from t1_atss_fpn" in done.stderr
