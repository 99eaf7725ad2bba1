"""The frame of every picture, and that nothing draws outside it."""

import ast
from pathlib import Path

import pytest
from matplotlib.image import imread

from spiking_mamba.reports.figures import picture

ROOT = Path(__file__).parents[3]


def test_size(tmp_path):
    with picture(tmp_path / "a.png", 4, 3, dpi=50) as (_, axes):
        axes.plot([0, 1])
    assert imread(tmp_path / "a.png").shape == (150, 200, 4)


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"before")
    with pytest.raises(KeyError), picture(path, 4, 3):
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize(("low", "high"), [(1e-7, 0.5), (0.03, 40.0), (2.0, 7.0), (1.0, 1e9)])
def test_logarithmic_axes_are_labelled_with_numbers(low, high, tmp_path, drawn):
    with picture(tmp_path / "a.png", 5, 4, ncols=2) as (figure, (line, heat)):
        line.plot([low, high], [low, high])
        line.set(xscale="log", yscale="log", xlabel="x")
        figure.colorbar(heat.imshow([[low, high]], norm="log"))
    drawn.check()
    labels = [tick.get_text() for tick in line.get_xticklabels(which="both") if tick.get_text()]
    assert labels
    for label in labels:
        assert float(label) > 0


def global_state(path):
    """The lines of a file that import or set what all of a program's figures share."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        if any(name.startswith(("matplotlib.pyplot", "matplotlib.use", "pylab")) for name in names):
            yield node.lineno


def test_nothing_touches_matplotlibs_global_state():
    files = [path for room in ("neurons", "spiking_mamba", "recipes") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 50
    assert not {f"{path.relative_to(ROOT)}:{line}" for path in files for line in global_state(path)}
