"""How a diagnosis is shown: as text, as a figure, and on the command line."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import patients
import pytest
import torch

import deqkit

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def found() -> deqkit.Diagnosis:
    f, x0, args = patients.expanding()
    return deqkit.diagnose(f, x0, args=args)


@pytest.fixture(scope="module")
def ailing() -> deqkit.Diagnosis:
    f, x0, args = patients.coupled()
    return deqkit.diagnose(f, x0, args=args, max_steps=12)


def test_text(found: deqkit.Diagnosis, capsys: pytest.CaptureFixture[str]) -> None:
    print(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Diagnosis of Cell: 4 samples of 16 numbers, float32, cpu; rtol=0.0001, max_steps=50"
    assert len(lines) < 60 and max(len(line) for line in lines) <= 140
    text = "\n".join(lines)
    parts = ["checks", "solvers", "df/dx at the fixed point, per sample", "adjoints", "what follows", "cost: f called"]
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)
    for name in ("fixed_point", "anderson", "broyden", "newton_krylov", "auto"):
        assert any(line.startswith(f"  {name}") for line in lines)
    table = [line for line in lines if line.startswith(("solvers ", "  fixed_point", "  anderson ", "  broyden"))]
    end = table[0].index("calls of f") + len("calls of f")
    calls = {t.name: str(t.num_fn_evals) for t in found.solvers}
    for row in table[1:]:
        assert row[:end].endswith(calls[row.split()[0]])  # aligned
    assert "0/4" in table[1] and "4/4" in table[2]
    assert text.count("  * ") == len(found.recommendations)


def test_text_of_an_ailing_f(ailing: deqkit.Diagnosis) -> None:
    text = str(ailing)
    assert text.count("FAILED") == 2 and "without what ails f" in text and len(text.splitlines()) < 60
    assert "of the batch as one system" in text
    skipped = str(deqkit.diagnose(lambda x: x[:1], torch.ones(3, 2)))
    assert "not checked, see 'structure': keeps x, finite" in skipped and len(skipped.splitlines()) < 20


def test_text_of_many_samples() -> None:
    f, x0, args = patients.patient(patients.contraction(), batch=300)
    lines = str(deqkit.diagnose(f, x0, args=args, adjoints=[])).splitlines()
    assert len(lines) < 45 and any("300/300" in line for line in lines)


def panels(figure: Any) -> dict[str, Any]:
    return {axes.get_title(): axes for axes in figure.axes}


def test_figure(found: deqkit.Diagnosis, tmp_path: Path) -> None:
    figure = found.plot()
    residuals, steps, eigenvalues, gradients = panels(figure).values()
    assert "best residual so far" in residuals.get_title() and residuals.get_yscale() == "log"
    labels = [text.get_text() for text in residuals.get_legend().get_texts()]
    assert labels[:2] == ["fixed_point (0/4)", "anderson (4/4)"] and labels[-1] == "rtol = 0.0001"
    anderson = next(t for t in found.solvers if t.name == "anderson")
    assert anderson.trace is not None
    best = anderson.trace.nan_to_num(nan=torch.inf).cummin(dim=0).values
    line = next(line for line in residuals.get_lines() if line.get_label() == "anderson (4/4)")
    assert list(line.get_xdata()) == list(range(1, anderson.num_fn_evals + 1))
    assert line.get_ydata()[-1] == pytest.approx(float(best[-1].median()), rel=1e-6)
    assert "radius 1.2" in eigenvalues.get_title() and "the worst" in eigenvalues.get_title()
    assert sum(len(c.get_offsets()) for c in eigenvalues.collections) == 16
    assert [label.get_text() for label in gradients.get_yticklabels()] == [
        t.name for t in found.adjoints if t.cosine is not None
    ]
    errors = [t.relative_error for t in found.adjoints if t.relative_error is not None]
    assert [bar.get_width() for bar in gradients.patches] == pytest.approx(errors)
    best_solver = found.best
    assert best_solver is not None and best_solver.num_steps is not None
    assert f"{best_solver.name}: 4 of 4 converged" in steps.get_title()
    assert [bar.get_height() for bar in steps.patches] == best_solver.num_steps.tolist()
    assert "fit for solve" in figure.get_suptitle()
    for suffix in ("png", "pdf", "svg"):
        figure.savefig(tmp_path / f"figure.{suffix}")
        assert (tmp_path / f"figure.{suffix}").stat().st_size > 1000


def test_figure_of_an_ailing_f(ailing: deqkit.Diagnosis, tmp_path: Path) -> None:
    figure = ailing.plot()
    residuals, samples, eigenvalues = panels(figure).values()
    labels = [text.get_text() for text in residuals.get_legend().get_texts()]
    assert "anderson, batch_dims=0 (0/1)" in labels and samples.get_title().startswith("relative residuals per sample")
    assert "as one system" in eigenvalues.get_title() and "no fixed point to differentiate" in figure.get_suptitle()
    figure.savefig(tmp_path / "figure.png")


@pytest.mark.parametrize(
    "f, x0, count",
    [
        (lambda x: x[:1], torch.ones(3, 2), 0),
        (lambda x: x * torch.nan, torch.ones(3, 2), 2),
        (lambda x: x * torch.nan, torch.ones(30, 2), 2),
        (lambda x: 0.5 * x + torch.rand_like(x), torch.ones(30, 2), 2),
        (lambda x: x, torch.ones(1, 1), 3),
        (lambda x: 0.5 * x + torch.arange(40.0).reshape(40, 1), torch.ones(40, 2), 3),
    ],
)
def test_figures_of_odd_cases(f: Any, x0: Any, count: int, tmp_path: Path) -> None:
    figure = deqkit.diagnose(f, x0, max_steps=8).plot()
    figure.savefig(tmp_path / "figure.png")
    assert len(figure.axes) == count


def test_without_matplotlib(found: deqkit.Diagnosis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'deqkit\[diagnostics\]'"):
        found.plot()


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    d = deqkit.diagnose(lambda x: 0.5 * torch.cos(x), torch.zeros(2, 100), solvers=["anderson"])
    assert d.healthy and d.spectrum is not None and d.spectrum.radius is not None and d.spectrum.eigenvalues is None
    assert "needs scipy" in d.spectrum.note and "needs scipy" in str(d) and len(d.plot().axes) == 2


# ---------------------------------------------------------------------------------------------------------------------
# the command line

FACTORIES = """
import torch

def good():
    return lambda x: 0.5 * torch.cos(x), torch.zeros(2, 3)

def with_args():
    return lambda x, b: 0.5 * x + b, torch.zeros(2, 3), (torch.ones(2, 3),)

def as_dict():
    return {"f": lambda x: 0.5 * torch.cos(x), "x0": torch.zeros(2, 2, 3), "batch_dims": 2, "solvers": ["broyden"]}

class Model:
    @staticmethod
    def make():
        return good()

def noisy():
    return lambda x: x + torch.rand_like(x), torch.zeros(2, 3)

def wrong():
    return torch.zeros(2)

def too_many():
    return 1, 2, 3, 4

def typo():
    return {"f": torch.cos, "x0": torch.zeros(2, 3), "batch_dim": 1}

def halved():
    return {"f": torch.cos}

def integers():
    return torch.cos, torch.zeros(2, 3, dtype=torch.int64)

def fails():
    raise OSError("no weights")

number = 3
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from deqkit.diagnose import main

    (tmp_path / "my_cells.py").write_text(FACTORIES)
    (tmp_path / "my_broken.py").write_text("import a_library_that_is_not_there")
    (tmp_path / "my_syntax.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("my_cells", "my_broken", "my_syntax"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return main


@pytest.mark.parametrize("target", ["good", "with_args", "as_dict", "Model.make"])
def test_command(command: Any, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command([f"my_cells:{target}"]) == 0
    assert "what follows" in capsys.readouterr().out


def test_command_options(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["my_cells:good", "--plot", "figure.svg", "--rtol", "1e-3", "--max-steps", "9"]) == 0
    assert "rtol=0.001, max_steps=9" in capsys.readouterr().out and "<svg" in Path("figure.svg").read_text()
    assert command(["my_cells:noisy", "--max-steps", "5"]) == 1
    assert command(["my_cells:good", "--max-steps", "5", "--plot", "nowhere/figure.png"]) == 2
    assert "no figure was written to nowhere/figure.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, says",
    [
        (["my_cells"], "expected module:factory"),
        (["my_cells.py:good"], "try my_cells:good"),
        (["my_cell:good"], "no module named 'my_cell'"),
        (["my_cells.inner:good"], "no module named 'my_cells.inner'"),
        (["my_cells:god"], "has no 'god'; it has good, with_args"),
        (["my_cells:number"], "must be a function without arguments, got int"),
        (["my_cells:wrong"], "must return (f, x0), (f, x0, args) or a dict of arguments, got Tensor"),
        (["my_cells:too_many"], "got a tuple of 4"),
        (["my_cells:typo"], "unknown keys ['batch_dim']"),
        (["my_cells:halved"], "a dict without x0"),
        (["my_cells:integers"], "floating or complex dtype"),
        (["my_cells:fails"], "my_cells:fails() failed, see above"),
        (["my_broken:f"], "my_broken cannot be imported"),
        (["my_syntax:f"], "my_syntax cannot be imported"),
        (["my_cells:good", "--max-steps", "0"], "max_steps must be at least 1"),
    ],
)
def test_command_refuses(command: Any, argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(argv) == 2
    said = capsys.readouterr().err
    assert says in said and said.splitlines()[-1].startswith("python -m deqkit.diagnose: error: ")
    if "fails" in argv[0]:
        assert "OSError: no weights" in said


def test_command_as_a_process(tmp_path: Path) -> None:
    """Without a warning that the module was imported before it ran; and the module may be called as the function."""
    (tmp_path / "my_cells.py").write_text(FACTORIES)
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "deqkit.diagnose", "my_cells:good"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=_environment(), check=False)
    assert done.returncode == 0 and not done.stderr and "what follows" in done.stdout
    code = (
        "import sys, deqkit; assert 'deqkit.diagnose' not in sys.modules; before = deqkit.diagnose;"
        "import deqkit.diagnose; from deqkit import diagnose; import torch;"
        "assert diagnose(torch.cos, torch.zeros(2, 3)).healthy and before.__module__ == 'deqkit.diagnosis.doctor';"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=_environment(), check=True)


def _environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_the_module_shows_the_functions_signature() -> None:
    import importlib

    function = deqkit.diagnosis.diagnose  # pyright: ignore
    try:
        module: Any = importlib.import_module("deqkit.diagnose")
        assert callable(module) and inspect.signature(module) == inspect.signature(function)
        assert module(torch.cos, torch.zeros(1, 1), solvers=["broyden"]).healthy
    finally:
        deqkit.diagnose = function
