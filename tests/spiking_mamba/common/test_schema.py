"""Typed settings: what is taken, what is refused and in which words, and what --help says."""

import dataclasses
import math
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from spiking_mamba.common.schema import (
    Auto,
    Count,
    Fraction,
    Name,
    Names,
    Positive,
    Seed,
    Seeds,
    SettingsError,
    Sources,
    mapping_of,
    schema,
)
from spiking_mamba.common.words import described, descriptions, words


@schema
class Loss:
    """Weights.

    Attributes:
        kl: of the divergence.
    """

    kl: Annotated[float, Field(ge=0)] = 1.0
    kind: Literal["mse", "cosine"] = "mse"


@schema
class Example:
    """An example.

    Attributes:
        output: where results go,
            in a folder.
        steps, rows: how many.
        loss: see ``Loss``.
    """

    output: Name
    steps: Count | None = None
    rows: Count = 1
    rate: Positive = 1.0
    share: Fraction = 0.5
    flag: bool = False
    compile: Auto = "auto"
    data: Sources = field(default_factory=lambda: ["here"])
    tasks: Names = field(default_factory=list)
    seed: Seed = 0
    seeds: Seeds = field(default_factory=lambda: [0])
    loss: mapping_of(Loss) = field(default_factory=dict)
    losses: list[mapping_of(Loss)] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.rows == 13:
            raise ValueError("rows must not be 13.")


def test_what_is_taken():
    found = Example(Path("a/b"), 3, rate=2, tasks="piqa", data=("x", Path("y")), loss={"kl": 1})
    assert (found.output, found.steps, found.tasks, found.data) == ("a/b", 3, ["piqa"], ["x", "y"])
    assert type(found.rate) is float
    assert type(found.loss["kl"]) is int  # a mapping stays as it was given
    assert dataclasses.replace(found, steps=4).steps == 4
    assert dataclasses.asdict(found)["loss"] == {"kl": 1}
    found.steps = None
    assert Example("a", tasks=None).tasks == []
    assert Example("a", compile=True).compile is True


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output": 3}, "output must be a name, got 3."),
        ({"output": ""}, "output must not be empty, got ''."),
        ({"output": "a\0b"}, "output must have no control characters, got 'a\\x00b'."),
        ({"output": "a" * 300}, f"output must have at most 255 bytes between slashes, got '{'a' * 60}...'."),
        ({"steps": True}, "steps must be an integer of at least 1 and below 2**31 or null, got True."),
        ({"steps": 0}, "steps must be an integer of at least 1 and below 2**31 or null, got 0."),
        ({"steps": 1.0}, "steps must be an integer of at least 1 and below 2**31 or null, got 1.0."),
        ({"rate": math.inf}, "rate must be a number above 0, got inf."),
        ({"rate": math.nan}, "rate must be a number above 0, got nan."),
        ({"rate": "1e-3"}, "rate must be a number above 0, got '1e-3'."),
        ({"share": 1.5}, "share must be a number of at least 0 and of at most 1, got 1.5."),
        ({"flag": 1}, "flag must be true or false, got 1."),
        ({"compile": 1}, "compile must be true, false or 'auto', got 1."),
        ({"compile": "Auto"}, "compile must be true, false or 'auto', got 'Auto'."),
        ({"data": []}, "data must be a name or a list of names, got []."),
        ({"tasks": ["a", 3]}, "tasks must be a name or a list of names, got ['a', 3]."),
        ({"tasks": ["a", ""]}, "tasks[1] must not be empty, got ''."),
        ({"seed": 2**32}, "seed must be an integer of at least 0 and below 2**32, got 4294967296."),
        ({"seeds": []}, "seeds must be a list of integers from 0, got []."),
        ({"seeds": [1, 1]}, "seeds must not have the same twice, got [1, 1]."),
        ({"loss": 3}, "loss must be a mapping, got 3."),
        ({"loss": {"kll": 1}}, "Unknown key 'kll' in loss; did you mean 'kl'?"),
        ({"loss": {"kl": -1}}, "loss.kl must be a number of at least 0, got -1."),
        ({"loss": {"kind": "l1"}}, "loss.kind must be 'mse' or 'cosine', got 'l1'."),
        ({"losses": [{}, {"kl": True}]}, "losses[1].kl must be a number of at least 0, got True."),
        ({"rows": 13}, "rows must not be 13."),
        ({"row": 1}, "Unknown key 'row' in Example; did you mean 'rows'?"),
        (
            {"rate": "x" * 1000, "rows": -1},
            "rows must be an integer of at least 1 and below 2**31, got -1. "
            f"rate must be a number above 0, got '{'x' * 60}...'.",
        ),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(SettingsError) as refused:
        Example(**{"output": "a"} | given)
    assert str(refused.value) == message
    found = Example("a")
    [key] = list(given)[:1]
    if key != "row" and len(given) == 1 and given != {"rows": 13}:
        with pytest.raises(SettingsError) as refused:
            setattr(found, key, given[key])
        assert str(refused.value) == message


def test_what_is_missing():
    with pytest.raises(SettingsError, match=r"^Example must set output.$"):
        Example()


def test_words():
    assert words(Count | None) == "an integer of at least 1 and below 2**31 or null"
    assert words(list[int]) == "a list of integers"
    assert words(Literal["a", "b", True]) == "'a', 'b' or true"
    assert words(dict[str, float]) == "a mapping to numbers"
    assert descriptions(Example) == {
        "output": "where results go, in a folder.",
        "steps": "how many.",
        "rows": "how many.",
        "loss": "see ``Loss``.",
    }
    text = "\n".join(described(Example))
    assert "  output: a name (required)\n      where results go, in a folder.\n" in text
    assert "  rows: an integer of at least 1 and below 2**31 (default: 1)\n      how many." in text
    assert "  loss.kl: a number of at least 0 (default: 1.0)\n      of the divergence." in text
