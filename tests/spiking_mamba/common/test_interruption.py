"""What Ctrl-C is answered."""

import ast
import os
import signal
from pathlib import Path

import pytest

from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.interruption import interruptible, measured_so_far
from spiking_mamba.training.run import kept_in

ROOT = Path(__file__).parents[3]
COMMANDS = ROOT / "spiking_mamba/commands"
SCRIPTS = [
    path
    for path in sorted([*ROOT.glob("recipes/*/*.py"), *COMMANDS.glob("*.py")])
    if "__main__" in path.read_text()
]


@pytest.fixture(autouse=True)
def handler():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@fail_clearly()
def command(*sentences):
    if not sentences:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError
    with interruptible(lambda: sentences[0]):
        command.__wrapped__(*sentences[1:])


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [([], "nothing was written."), (["a."], "a."), (["outer.", "inner."], "outer.")],
)
def test_the_outermost_sentence_is_said(sentences, expected, capsys):
    with pytest.raises(SystemExit) as end:
        command(*sentences)
    assert end.value.code == 130
    assert capsys.readouterr() == ("", f"interrupted: {expected}\n")
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # once more, and it ends at once


def test_of_several_processes_the_first_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == 130
    assert capsys.readouterr() == ("", "")


def test_a_library_gets_the_interrupt_itself():
    with pytest.raises(KeyboardInterrupt) as caught, interruptible(lambda: "a."):
        raise KeyboardInterrupt
    assert caught.value.__notes__ == ["a."]


def test_what_a_training_keeps(tmp_path):
    assert kept_in(tmp_path / "none").startswith(f"nothing trained is kept in {tmp_path / 'none'};")
    for step, complete in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}/complete").touch()
    assert kept_in(tmp_path) == f"{tmp_path} holds the checkpoint of step 10; resume=true goes on from there."
    (tmp_path / "model").mkdir()
    assert kept_in(tmp_path) == f"{tmp_path / 'model'} is trained and stays; resume=true does the rest."
    (tmp_path / "other/model").mkdir(parents=True)
    assert "without a checkpoint: resume=true trains it again" in kept_in(tmp_path / "other")


def test_what_a_benchmark_keeps(tmp_path):
    assert measured_so_far([1], None, "step.json") == measured_so_far([], tmp_path, "step.json")
    assert "step.json holds the 2 rows" in measured_so_far([1, 2], tmp_path, "step.json")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_ends_clearly(script):
    """Whatever its main does; a script that has none calls a command's."""
    body = ast.parse(script.read_text()).body
    found = [n for n in body if getattr(n, "name", "") == "main"]
    if not found:
        (command,) = [n.module.split(".")[-1] for n in body if isinstance(n, ast.ImportFrom)]
        assert COMMANDS / f"{command}.py" in SCRIPTS
    else:
        assert [ast.unparse(d) for main in found for d in main.decorator_list] == ["fail_clearly()"]
