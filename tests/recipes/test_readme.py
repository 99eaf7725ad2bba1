"""The README keeps its promises: its commands exist, its Python runs, its files are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path, monkeypatch, capsys):
    for folder in ("recipes", "weights"):  # whose models it loads
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    for promised in re.findall(r"^print\(.*\)  # (.*)$", code, flags=re.MULTILINE):
        assert promised in printed


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    promised = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE))
    assert {"quickstart", "test", "gpu"} <= promised <= targets


def test_files_exist():
    named = set(re.findall(r"\b((?:recipes|docs|tests|neurons|spiking_mamba)/[\w/.-]*\w)", README))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert named
    assert not missing
