"""What annotations and docstrings of a schema say, in words for errors and ``--help``."""

import dataclasses
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union

from pydantic.fields import FieldInfo

__all__ = ["Words", "described", "descriptions", "hints_of", "words"]

_PLAIN = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "a mapping",
    list: "a list",
    types.NoneType: "null",
    Any: "anything",
}
_MOST = 8  # alternatives that are told
_SEVERAL = {int: "integers", float: "numbers", str: "strings", dict: "mappings"}


@dataclasses.dataclass(frozen=True)
class Words:
    """In an annotation: what errors and ``--help`` call the type, and whose fields a mapping's keys are."""

    text: str
    fields: type | None = None


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """The fields of a dataclass with their annotations, as they are written."""
    known = typing.get_type_hints(cls, include_extras=True)
    return {field.name: known[field.name] for field in dataclasses.fields(cls) if field.init}


def words(annotation: Any) -> str:
    """``Annotated[int, Field(ge=1)] | None``: 'an integer of at least 1 or null'."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        own, *notes = members
        notes = [n for note in notes for n in (note.metadata if isinstance(note, FieldInfo) else [note])]
        named = [note.text for note in notes if isinstance(note, Words)]
        return named[-1] if named else words(own) + _bounds(notes)
    if origin in (Union, types.UnionType):
        return _alternatives([words(member) for member in members])
    if origin is Literal:
        return _alternatives([_literal(member) for member in members])
    if origin is list and members:
        inner = typing.get_args(members[0])[0] if typing.get_origin(members[0]) is Annotated else members[0]
        kind = typing.get_origin(inner) or inner
        several = _SEVERAL.get(kind)
        return f"a list of {several}" if several else f"a list, each {words(members[0])}"
    if origin is dict and members[1:] != (Any,):
        return f"a mapping to {_SEVERAL.get(members[1], words(members[1]))}"
    return _PLAIN.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))


def _alternatives(several: list[str]) -> str:
    several = list(dict.fromkeys(several))
    if len(several) > _MOST:
        several = [*several[:_MOST], "another"]
    return f"{', '.join(several[:-1])} or {several[-1]}" if len(several) > 1 else several[0]


def _literal(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def _bounds(notes: list[Any]) -> str:
    told = {
        "ge": "of at least {}",
        "gt": "above {}",
        "le": "of at most {}",
        "lt": "below {}",
        "min_length": "with at least {}",
        "max_length": "with at most {}",
    }
    bounds = [(text, getattr(note, name, None)) for note in notes for name, text in told.items()]
    said = [text.format(_power(bound)) for text, bound in bounds if bound is not None]
    return f" {' and '.join(said)}" if said else ""


def _power(value: Any) -> str:
    """2**31 is easier read than its digits."""
    exponent = value.bit_length() - 1 if isinstance(value, int) else 0
    return f"2**{exponent}" if exponent > 20 and value == 2**exponent else f"{value:g}"


def descriptions(cls: type) -> dict[str, str]:
    """What the ``Attributes`` of a class's docstring, and of its bases', say of each.

    Several may stand before one colon; what a class says goes before what its bases say.
    """
    texts: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        _, _, text = inspect.cleandoc(vars(each).get("__doc__") or "").partition("\nAttributes:\n")
        for entry in re.split(r"\n(?=\S)", textwrap.dedent(text)):
            names, colon, about = entry.partition(":")
            names = " ".join(names.split())  # a long list of them is wrapped
            if colon and re.fullmatch(r"\w+(, \w+)*", names):
                texts |= dict.fromkeys(names.split(", "), " ".join(about.split()))
    return texts


def described(cls: type, prefix: str = "") -> Iterator[str]:
    """For ``--help``: each key with its type, its default and its meaning; keys of mappings with a dot."""
    about, hints = descriptions(cls), hints_of(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        name, hint = f"{prefix}{field.name}", hints[field.name]
        yield f"  {name}: {words(hint)}{_default(field)}"
        if text := about.get(field.name):
            yield textwrap.fill(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
        for note in typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ():
            if isinstance(note, Words) and note.fields is not None:
                yield from described(note.fields, f"{name}.")


def _default(field: dataclasses.Field) -> str:
    default = field.default
    if isinstance(default, FieldInfo):
        default = default.default_factory() if default.default_factory else default.default  # type: ignore[call-arg]
    elif field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is dataclasses.MISSING:
        return " (required)"
    spoken = {None: "null", True: "true", False: "false"}
    text = spoken[default] if default is None or isinstance(default, bool) else str(default)
    return f" (default: {text!r})" if text == "" else f" (default: {text})"
