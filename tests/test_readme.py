"""The README's examples run, and its commands are the ones that are tested."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_examples_run() -> None:
    """One after the other: a reader has seen the earlier ones when he comes to a later one."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for i, code in enumerate(EXAMPLES):
        exec(compile(code, f"README.md, example {i + 1}", "exec"), names)


def test_the_two_commands() -> None:
    assert len(EXAMPLES) >= 2
    assert "pip install -e '.[detection]' && python examples/retinanet_ifpn.py\n" in README
    command = "pip install -e '.[dev]' && pytest\n"
    assert command in README and command in (ROOT / ".ci" / "run").read_text()
