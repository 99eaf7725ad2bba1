"""The documentation's pages keep their promises: all of their blocks run, one after another."""

import contextlib
import re
import subprocess

import pytest

from tests.helpers.blocks import blocks, promised
from tests.helpers.commands import ROOT, run

DOCS = ROOT / "docs"
PAGES = [DOCS / name for name in ("index.md", "tutorial.md")] + sorted(
    path for folder in ("howto", "ideas", "api") for path in (DOCS / folder).glob("*.md")
)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that has what a page reads, and may be written to."""
    for name in ("README.md", "docs", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return tmp_path


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.runs for b in blocks(p))], ids=lambda page: page.stem
)
def test_a_page_runs_from_top_to_bottom(page, checkout, capsys):
    names = {"__name__": "page"}
    for block in blocks(page):
        if block.runs and block.language == "python":
            exec(compile(block.code, str(page), "exec"), names)
            printed = capsys.readouterr().out
            missing = [line for line in promised(block.code) if line not in printed.splitlines()]
            assert not missing, printed
        elif block.runs:
            for command in block.commands():
                run_command(command, block.more, checkout)


def run_command(command, more, folder):
    program, *words = command
    if program == "spiking-mamba":
        done = run(ROOT / "spiking_mamba_console.py", *words, *more, cwd=folder)
        assert done.returncode == 0, done.stderr
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(words) <= set(targets)  # .ci/run makes the quickstart
    else:
        assert program in ("cat", "cp")
        subprocess.run(" ".join(command), shell=True, check=True, cwd=folder)


def test_what_does_not_run_says_why_and_is_python_all_the_same():
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("python", "bash", "text", "math"), page
            assert re.fullmatch(r"|not run: .{8,}|run with: .+", block.comment), page
            if block.language == "python":
                compile(block.code, str(page), "exec")
            for script in re.findall(r"recipes/[\w/.-]+", block.code):
                assert (ROOT / script).exists(), script


def test_the_reference_has_every_public_name():
    import neurons
    import spiking_mamba
    import spiking_mamba.energy
    import spiking_mamba.joules
    import spiking_mamba.spikes

    shown = [
        name
        for page in (DOCS / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)
    ]
    found = {id(resolve(name)) for name in shown}
    assert len(found) == len(shown) > 50
    for module in (neurons, spiking_mamba):
        missing = [name for name in module.__all__ if id(getattr(module, name)) not in found]
        assert not set(missing) - {"surrogate"}, module  # whose classes `neurons` exports


def resolve(name):
    """The object of a dotted name."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            value = __import__(".".join(parts[:size]), fromlist=["_"])
            for part in parts[size:]:
                value = getattr(value, part)
            return value
    raise ModuleNotFoundError(name)
