"""The README's examples run, and its commands are the ones that are tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run(code: str) -> None:
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})


def test_the_two_commands() -> None:
    assert len(EXAMPLES) >= 2
    assert "pip install -e '.[detection]' && python examples/retinanet_ifpn.py\n" in README
    command = "pip install -e '.[dev]' && pytest\n"
    assert command in README and command in (ROOT / ".ci" / "run").read_text()
