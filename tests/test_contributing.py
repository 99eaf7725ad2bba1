"""CONTRIBUTING.md names files that are there."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_every_file_of_the_recipes_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## How to add")[1].split("## Tests")[0]
    recipes = re.split(r"^\*\*(?=A)", text, flags=re.MULTILINE)[1:]
    assert len(recipes) == 8
    for recipe in recipes:
        paths = re.findall(r"`((?:neurons|spiking_mamba|recipes|tests|docs)/[\w/.<>]+)`", recipe)
        assert 2 <= len(set(paths)) <= (9 if "kernel" in recipe.split(".")[0] else 5), recipe
        assert [path for path in paths if "<" not in path and not (ROOT / path).exists()] == []


def test_pre_commit_runs_what_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    commands = re.findall(r"\$\(BIN\)/(ruff check|ruff format|mypy)", lint)
    assert [
        re.match(r"\.venv/bin/(ruff check|ruff format|mypy)", hook["entry"])[1] for hook in hooks
    ] == commands
