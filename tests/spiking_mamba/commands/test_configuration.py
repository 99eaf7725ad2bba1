"""What a command's line leads to: configurations by name, the package's checkpoints from any folder."""

import dataclasses
import sys
from pathlib import Path

import pytest

from spiking_mamba.commands import configuration
from spiking_mamba.commands.configuration import CONFIGURATIONS, command_settings, home, located
from spiking_mamba.common.schema import Name, Names, schema

ROOT = Path(__file__).parents[3]
TEACHER = "recipes/quickstart/teacher"


@schema
class Settings:
    """Of a command.

    Attributes:
        model: a name.
        several: names.
        size: a number.
    """

    model: Name
    several: Names = dataclasses.field(default_factory=list)
    size: int = 1


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Two configurations of one command and one of another, below a home of their own."""
    for name in ("a", "b", "only"):
        (tmp_path / "home/recipes").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"home/recipes/{name}.yaml").write_text(f"model: of {name}\n")
    several = {"two": ["recipes/a.yaml", "recipes/b.yaml"], "one": ["recipes/only.yaml"]}
    monkeypatch.setattr(configuration, "CONFIGURATIONS", several)
    monkeypatch.setattr(configuration, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(sys, "argv", ["spiking-mamba test"])
    monkeypatch.chdir(tmp_path)
    return lambda name, *words: command_settings(Settings, name, "About.", words)


def test_a_configuration_goes_by_its_name(command):
    assert command("two", "b", "size=3") == Settings(model="of b", size=3)
    assert command("one") == Settings(model="of only")
    assert command("one", "only") == command("one", "--size", "1")
    assert command("none", "model=x", "several=[y]") == Settings(model="x", several=["y"])


def test_a_file_comes_before_a_name(command, tmp_path):
    (tmp_path / "b").write_text("model: mine\n")
    (tmp_path / "x=1.yaml").write_text("model: odd\n")
    assert command("two", "b").model == "mine"
    assert command("one", "x=1.yaml").model == command("none", "x=1.yaml").model == "odd"


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("two", ["c"], "c is no file, and no configuration that comes with the package: a, b."),
        ("two", [], "comes with the package: a, b."),
        ("two", ["size=1"], "comes with the package: a, b."),
        ("two", ["c.yaml"], "There is no settings file c.yaml."),
        ("two", ["a", "sise=1"], "did you mean 'size'?"),
        ("one", ["sise=1"], "did you mean 'size'?"),
        ("none", ["model=x", "sise=1"], "Unknown key 'sise' in the command line; did you mean 'size'?"),
        ("none", [], "must set model."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(command, capsys, name, words, said):
    with pytest.raises(SystemExit) as end:
        command(name, *words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.splitlines()[-1].startswith("spiking-mamba test: error: ")


def test_help_names_the_configurations(command, capsys):
    for name, said in (("two", "by name: a, b"), ("one", "by name: only"), ("none", "[config]")):
        with pytest.raises(SystemExit) as end:
            command(name, "--help")
        assert not end.value.code
        assert said in capsys.readouterr().out


def test_checkpoints_of_the_package_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert located(TEACHER) == TEACHER  # as it stands there
    monkeypatch.chdir(tmp_path)
    there = str(ROOT / TEACHER)
    assert located(TEACHER) == there
    assert located([TEACHER, "recipes/none", 3, None]) == [there, "recipes/none", 3, None]
    assert located({"a": TEACHER}) == {"a": there}
    (tmp_path / TEACHER).mkdir(parents=True)
    assert located(TEACHER) == TEACHER  # the user's own


def test_names_stay_what_the_user_wrote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["spiking-mamba test", f"model={TEACHER}", f"several=[{TEACHER}, b]"])
    made = command_settings(Settings, "none", None)
    assert made == Settings(model=str(ROOT / TEACHER), several=[str(ROOT / TEACHER), "b"])
    said = {"model": lambda given: {"it": given}}
    words = [f"model={TEACHER}"]

    @schema
    class Named:
        """Attributes:
        model: names.
        """

        model: Name | dict[str, Name]

    assert command_settings(Named, "none", None, words, said).model == {"it": str(ROOT / TEACHER)}
    assert command_settings(Named, "none", None, ["model=b"], said).model == "b"


def test_every_configuration_is_there_and_has_a_name_of_its_own():
    for names in CONFIGURATIONS.values():
        assert all((home() / name).is_file() for name in names)
        assert len({Path(name).stem for name in names}) == len(names)
