"""Wrong settings, made of right ones: of every field by its type, of what is nested, of YAML itself."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from spiking_mamba.common.words import hints_of, words
from tests.storm.inputs import NEURON, Recipe

HUGE = 10**30


class Case(NamedTuple):
    """Settings that are wrong (or right), and how they are given.

    Attributes:
        recipe, kind: for the counts.
        names: of which a clear refusal names one.
        file: the content of the settings file; None: it is not there. A folder: "folder".
        arguments: behind it.
        right: nothing is wrong.
        before: what lies in the output's place: "" nothing, "file", "foreign" a folder that is no run.
    """

    recipe: str
    kind: str
    names: tuple[str, ...]
    file: bytes | str | None
    arguments: tuple[str, ...] = ()
    right: bool = False
    before: str = ""


# By the first words of a type: values that it does not take.
WRONG = {
    "an integer": ["true", "1.5", "many", "[1]", "-3", str(HUGE), ".nan", "'1'"],
    "a positive": ["true", "fast", ".nan", "-1"],
    "a number": ["true", "fast", ".nan", ".inf", "[1]", "'1'"],
    "a number or a list": ["true", "fast", ".nan", "[a]", "null"],
    "true or": ["1", "maybe", "null", "'true'"],
    "true, false": ["1", "maybe", "null"],
    "a name or a list": ["3", "true", "[1]", "[a, '']", '"a\\0b"'],
    "a name": ["3", "[a]", "{a: b}", "true", '"a\\0b"', "x" * 300],
    "a string": ["3", "[a]", "null"],
    "a list of names": ["3", "text", "[null]", "{a: b}"],
    "a list": ["3", "{a: b}", "[null]", "[[]]"],
    "a mapping": ["3", "[1]", "text"],
    "'": ["nonsense", "3", "[a]"],
    "0 or": ["-1", "true", "many"],
}

# what a value begins with that is right where the key's words say so
ALLOWED = {"null": "null", "[a]": " list of names", "{": " mapping"}

NESTED = yaml.safe_load(Path(__file__).with_name("nested.yaml").read_text())
STUDENTS = ("distill", "quickstart")
TRAINED = ("distill", "teacher", "align", "quickstart")


def _of_fields(name: str, recipe: Recipe, cls: type) -> Iterator[Case]:
    """Every field with values that are none of its type, misspelt, and left out where it is needed."""
    good = yaml.safe_dump(recipe.good)
    for number, (key, hint) in enumerate(hints_of(cls).items()):
        said = words(hint)
        kind = max((start for start in WRONG if said.startswith(start)), key=len, default=None)
        for place, value in enumerate(WRONG.get(kind or "", [])):
            if any(value.startswith(start) and kind_ in said for start, kind_ in ALLOWED.items()):
                continue
            if (number + place) % 2:
                yield Case(name, "type", (key,), good.encode(), (f"{key}={value}",))
            else:
                rest = {k: v for k, v in recipe.good.items() if k != key}
                plain = yaml.safe_dump(rest) if rest else ""
                yield Case(name, "type", (key,), f"{plain}{key}: {value}\n".encode())
        if "null" not in said and not said.startswith(("a name or a list", "anything")) and number % 2:
            yield Case(name, "type", (key,), good.encode(), (f"{key}=null",))
        wrong = key[: len(key) // 2] + key[len(key) // 2 + 1 :] + "x"
        yield Case(name, "unknown key", (wrong,), good.encode(), (f"{wrong}=1",))
    for key in recipe.good:
        if _needed(cls, key):
            rest = {k: v for k, v in recipe.good.items() if k != key}
            yield Case(name, "missing key", (key,), yaml.safe_dump(rest).encode())


def _needed(cls: type, key: str) -> bool:
    try:
        cls(**{})
    except ValueError as error:
        return key in str(error).removeprefix(f"{cls.__name__} must set ").rstrip(".").split(", ")
    return False


def _of_yaml(name: str, recipe: Recipe) -> Iterator[Case]:
    """A file that is no such text, and YAML that says what nobody means."""
    good, key = yaml.safe_dump(recipe.good), next(iter(recipe.good))
    nine = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
    )
    for content in (
        f"{good}{key}: again\n", f"{good}seed: 010\n", f"{good}limit: 1:30\n", f"{nine}{good}",
        "[" * 5000, f"x: {'{a: ' * 5000}", f"{good}x: &x [*x]\n", f"{good}x: [\n", f"{good}\tx: 1\n",
        "- a\n- b\n", "text", "3", f"{good}---\n{good}", "!!python/object/apply:os.getcwd []\n",
        f"{good}x: !!timestamp y\n", f"{good}? [a]\n: 1\n", f"{good}x: *nobody\n", f"{good}x: {'1' * 5000}\n",
        good.encode("utf-16"), bytes(range(256)) * 4, b"\0" * 100, b"PK\3\4" + bytes(200), "#" * 2**21,
        None, "folder",
    ):  # fmt: skip
        yield Case(name, "YAML", ("settings.yaml",), content.encode() if _is_text(content) else content)
    for words_ in (
        ("stray",), ("=3",), (".a=1",), ("a..b=1",), (f"{key}=[",), ("seed=010",), ("seed=1:30",),
        (f"{key}={{a: 1, a: 2}}",), (f"{key}=" + "[" * 3000,), ("--nobody", "3"), (f"{key}.a.b=1",),
    ):  # fmt: skip
        named = words_[0].removeprefix("--").partition("=")[0] or "=3"
        yield Case(name, "command line", (named,), good.encode(), words_)


def _is_text(content: Any) -> bool:
    return isinstance(content, str) and content != "folder"


def _of_nested(name: str, recipe: Recipe, inputs: Path) -> Iterator[Case]:
    """What is wrong within mappings and lists, or with what a name stands for."""
    good = yaml.safe_dump(recipe.good).encode()
    given = list(NESTED[name])
    given += NESTED["student"] if name in STUDENTS else []
    given += [f"training.{each}" for each in NESTED["training"] if name in TRAINED]
    if name == "study":  # whose rows may have no steps
        given += [f"common.{each}" for each in NESTED["student"] if not each.startswith("data")]
        given += [f"common.training.{each}" for each in NESTED["training"] if each != "max_steps=0"]
    for each in given:
        arguments = tuple(
            one.replace("EMPTY", str(inputs / "empty.txt")).replace("FOLDER", str(inputs))
            for one in ([each] if isinstance(each, str) else each)
        )
        key, _, value = arguments[0].partition("=")
        keys = key.split(".")
        within = re.findall(r"[A-Za-z_][\w.]{2,}", value)  # keys and names
        within += [part for dotted in within for part in dotted.split(".")[1:] if len(part) > 2]
        names = (keys[0], ".".join(keys[1:]) or key, keys[-1], *within)
        yield Case(name, "nested", names, good, arguments)


def _of_folders(name: str, recipe: Recipe, cls: type) -> Iterator[Case]:
    """An output that cannot be, or is somebody else's; and what excludes each other."""
    good, hints = recipe.good, hints_of(cls)
    if {"resume", "overwrite"} <= hints.keys():
        both = good | {"resume": True, "overwrite": True}
        yield Case(name, "folder", ("resume",), yaml.safe_dump(both).encode())
        for key in ("resume", "overwrite"):
            settings = yaml.safe_dump(good | {key: True}).encode()
            yield Case(name, "folder", ("run",), settings, before="foreign")
        yield Case(name, "folder", ("run",), yaml.safe_dump(good).encode(), before="foreign")
    if "output" in hints and good.get("output") in ("run", "runs"):
        yield Case(name, "folder", (good["output"],), yaml.safe_dump(good).encode(), before="file")
        below = good | {"output": f"{good['output']}/below"}
        yield Case(name, "folder", (good["output"],), yaml.safe_dump(below).encode(), before="file")


def _right_ones(name: str, recipe: Recipe, cls: type) -> Iterator[Case]:
    good, hints = yaml.safe_dump(recipe.good).encode(), hints_of(cls)
    yield Case(name, "right", (), good, right=True)
    if "training" in recipe.good:
        yield Case(
            name, "right", (), good, ("--training.learning_rate", "1e-3", "training.save_steps=1e1"), True
        )
        yield Case(name, "right", (), good, ("training.save_strategy=no", "--resume"), True)
    if "threshold" in hints:
        yield Case(name, "right", (), good, ("threshold={mean_abs: 0.5}", "learn-threshold=true"), True)
        yield Case(
            name, "right", (), good, (f"neuron={NEURON}", "threshold=[1, {in_proj: 1, out_proj: 0.5}]"), True
        )


def cases(name: str, recipe: Recipe, cls: type, inputs: Path) -> Iterator[Case]:
    """All cases of a recipe."""
    yield from _of_fields(name, recipe, cls)
    yield from _of_yaml(name, recipe)
    yield from _of_nested(name, recipe, inputs)
    if recipe.reaches:
        yield from _of_folders(name, recipe, cls)
        yield from _right_ones(name, recipe, cls)
