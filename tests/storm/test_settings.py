"""The short form of the storm of settings that `make storm` runs in full; and what --help says."""

import importlib
import re
from dataclasses import fields

import pytest
import yaml

from spiking_mamba.common.words import described, descriptions, hints_of, words
from spiking_mamba_console import COMMANDS
from tests.helpers.commands import ROOT, run
from tests.storm.inputs import recipes
from tests.storm.mutations import cases
from tests.storm.settings import RECIPES, settings_class


def test_a_few_wrong_settings_of_each_recipe_and_kind_are_refused_clearly():
    done = run(ROOT / "tests/storm/settings.py", "--short", fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = {line[7:].rstrip(): int(line[:5]) for line in done.stdout.splitlines()}
    [number] = [number for kind, number in counts.items() if re.match(r"settings in \d+ s", kind)]
    assert number >= 150
    assert counts["accepted and right"] >= 15
    assert not any(counts[fault] for fault in ("obscure", "late", "senseless", "refused though right"))


@pytest.mark.parametrize("name", recipes(ROOT))
def test_help_says_what_each_key_means(name):
    recipe = recipes(ROOT)[name]
    cls = settings_class(recipe)
    about, said = descriptions(cls), "\n".join(described(cls))
    for field in fields(cls):
        assert about.get(field.name), f"{cls.__name__}.{field.name} is not explained"
        assert f"  {field.name}: {words(hints_of(cls)[field.name])} (" in said
    assert set(recipe.good) <= set(hints_of(cls))


def test_every_script_and_command_with_settings_is_stormed():
    stormed = recipes(ROOT).values()
    scripts = {path for path in RECIPES.rglob("*.py") if _parses(path)}
    assert scripts == {recipe.path for recipe in stormed if recipe.path.is_relative_to(RECIPES)}
    for name in COMMANDS:
        module = importlib.import_module(f"spiking_mamba.commands.{name}")
        assert {recipe.settings for recipe in stormed} & vars(module).keys(), name


def _parses(path):
    text = path.read_text()
    own = re.search(r"parse_settings\([^)]*description=__doc__", text)  # not a part of another's
    return (own is not None and "def main(" in text) or "from spiking_mamba.commands." in text


def test_there_are_more_than_three_hundred():
    found = [
        case
        for name, recipe in recipes(ROOT).items()
        for case in cases(name, recipe, settings_class(recipe), ROOT)
    ]
    assert len(found) >= 300
    for case in found:
        if case.kind == "right":
            yaml.safe_load(case.file)
