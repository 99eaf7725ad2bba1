"""Typed, documented settings: a class of annotated fields, which pydantic holds every value against.

Types are strict: 1 is no boolean and true no integer, an integer is a number all the same, and a number is
finite. What an annotation says stands in errors and in ``--help``, too.
"""

import dataclasses
import functools
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, dataclass_transform, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function

from spiking_mamba.common.keys import shown, unknown_key
from spiking_mamba.common.words import Words, hints_of, words

__all__ = [
    "Auto",
    "Count",
    "Fraction",
    "Keys",
    "Name",
    "Names",
    "Natural",
    "Positive",
    "Seed",
    "Seeds",
    "SettingsError",
    "Source",
    "Sources",
    "Words",
    "as_list",
    "mapping_of",
    "schema",
    "schema_of",
]

T = TypeVar("T")
CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, validate_assignment=True)
MOST_PROBLEMS = 3  # that one error tells


class Problem(NamedTuple):
    """What is wrong: ``before``, the key, ``after``. An empty key: of the whole; None: it is not named."""

    key: str | None
    before: str
    after: str = ""

    def within(self, key: str) -> "Problem":
        """The same, of a mapping that stands under ``key`` of another."""
        if self.key is None:
            named = self.before.startswith(f"{key}.")
            return self if named else self._replace(before=f"{key}: {self.before}")
        return self._replace(key=f"{key}.{self.key}" if self.key else key)


class SettingsError(ValueError):
    """Values that a schema refuses; one line."""

    def __init__(self, owner: str, problems: Sequence[Problem]) -> None:
        self.problems = list(dict.fromkeys(problems))
        told = [
            f"{p.before}{'' if p.key is None else p.key or owner}{p.after}"
            for p in self.problems[:MOST_PROBLEMS]
        ]
        super().__init__(" ".join(told))


# Types of fields ----------------------------------------------------------------------------------------


def _path(value: Any) -> Any:
    """A path object is the name that it stands for."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _at_home(value: str) -> str:
    """``~/x`` is in the home folder whoever reads it; a shell expands it at the start of a word alone."""
    return os.path.expanduser(value) if value.startswith("~/") or value == "~" else value


def _check_filled(value: str) -> str:
    if not value.strip():
        raise ValueError(f"must not be empty, got {shown(value)}.")
    return value


def _check_name(value: str) -> str:
    if not value.isprintable():
        raise ValueError(f"must have no control characters, got {shown(value)}.")
    if any(len(part.encode(errors="replace")) > 255 for part in value.split("/")):
        raise ValueError(f"must have at most 255 bytes between slashes, got {shown(value)}.")
    return value


def _check_distinct(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError(f"must not have the same twice, got {shown(values)}.")
    return values


def as_list(value: Any) -> Any:
    """One value, several, or null for none, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _untupled(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


Natural = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# of a checkpoint, which may be in memory and have none
Source = Annotated[
    str, BeforeValidator(_path), AfterValidator(_at_home), AfterValidator(_check_name), Words("a name")
]
Name = Annotated[Source, AfterValidator(_check_filled), Words("a name")]
Seeds = Annotated[
    list[Seed], Field(min_length=1), AfterValidator(_check_distinct), Words("a list of integers from 0")
]
Names = Annotated[list[Name], BeforeValidator(as_list), Words("a name or a list of names")]
# of text, see spiking_mamba.data.load_text
Sources = Annotated[
    Name | Annotated[list[Name], Field(min_length=1)],
    BeforeValidator(_untupled),
    Words("a name or a list of names"),
]
Auto = Annotated[bool | Literal["auto"], Words("true, false or 'auto'")]


class Keys(Words):
    """In an annotation: a mapping that ``cls`` takes as keyword arguments; it stays as it was given."""

    def __init__(self, cls: type) -> None:
        super().__init__("a mapping", cls)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def _check(self, given: dict[str, Any]) -> dict[str, Any]:
        cls = self.fields
        assert cls is not None
        if (unknown := unknown_key(given, hints_of(cls))) is not None:
            raise SettingsError(
                cls.__name__, [Problem("", f"Unknown key {unknown[0]} in ", f"; {unknown[1]}")]
            )
        cls(**given)
        return given


def mapping_of(cls: type) -> Any:
    """The type of such a mapping, see :class:`Keys`, where a type is computed."""
    return Annotated[dict[str, Any], Keys(cls)]


# The decorator ------------------------------------------------------------------------------------------


@dataclass_transform(field_specifiers=(dataclasses.field, Field))
def schema(cls: type[T]) -> type[T]:
    """A dataclass whose values are held against its annotations when it is made and when they are set.

    ``__post_init__`` checks what no annotation says; the ``Attributes`` of the docstring explain the fields.
    What is refused is a :class:`SettingsError`.
    """
    made: Any = pydantic_dataclass(cls, config=CONFIG)
    begin, assign = made.__init__, made.__setattr__

    @functools.wraps(begin)
    def __init__(self: Any, *values: Any, **named: Any) -> None:
        try:
            begin(self, *values, **named)
        except ValidationError as error:
            raise SettingsError(made.__name__, list(_problems(made, error, named))) from None

    @functools.wraps(assign)
    def __setattr__(self: Any, name: str, value: Any) -> None:
        try:
            assign(self, name, value)
        except ValidationError as error:
            raise SettingsError(made.__name__, list(_problems(made, error, {name: value}))) from None

    made.__init__, made.__setattr__ = __init__, __setattr__
    return made


def _problems(cls: type, error: ValidationError, given: Mapping[str, Any]) -> Iterator[Problem]:
    """What pydantic found, in the words of the fields: all members of a union say the same."""
    missing, hints = [], hints_of(cls)
    for each in error.errors(include_url=False):
        # behind a field's name stand places in a list, and members of a union
        field, *rest = each["loc"] or ("",)
        key = str(field) + "".join(f"[{place}]" for place in rest if isinstance(place, int))
        inner = each.get("ctx", {}).get("error")
        if each["type"] == "missing":
            missing.append(key)
        elif each["type"] == "unexpected_keyword_argument":
            name, hint = unknown_key([field], hints) or (key, "")
            yield Problem("", f"Unknown key {name} in ", f"; {hint}")
        elif isinstance(inner, SettingsError):
            yield from (problem.within(key) if key else problem for problem in inner.problems)
        elif inner is not None and not each["loc"]:  # of __post_init__
            yield Problem(None, str(inner))
        elif inner is not None:
            yield Problem(key, "", f" {inner}")
        elif str(field) in hints:
            value = given.get(str(field), each["input"])
            yield Problem(str(field), "", f" must be {words(hints[str(field)])}, got {shown(value)}.")
        else:
            yield Problem("", "", f": {each['msg']}.")
    if missing:
        yield Problem("", "", f" must set {', '.join(missing)}.")


def schema_of(cls: type, names: Iterable[str], annotations: Mapping[str, Any], name: str) -> type:
    """A schema of fields of a dataclass that a library declares.

    Args:
        cls: the dataclass.
        names: of the fields.
        annotations: of those whose own say too little.
        name: of the schema.
    """
    declared = {field.name: field for field in dataclasses.fields(cls)}
    made = []
    for key in names:
        field = declared[key]
        kind = annotations.get(key, _by_value(field.type))
        if field.default is not dataclasses.MISSING:
            made.append((key, kind, dataclasses.field(default=field.default)))
        elif field.default_factory is not dataclasses.MISSING:
            made.append((key, kind, dataclasses.field(default_factory=field.default_factory)))
        else:
            made.append((key, kind, dataclasses.field(default=None)))
    return schema(dataclasses.make_dataclass(name, made, kw_only=True))


def _by_value(annotation: Any) -> Any:
    """Of an enumeration beside a string, the values that it knows; other annotations as they are."""
    several = get_args(annotation) or (annotation,)
    known = [each for each in several if isinstance(each, type) and issubclass(each, Enum)]
    if not known:
        return annotation
    values = Literal[tuple(each.value for each in known[0])]  # type: ignore[valid-type]
    return values | None if types.NoneType in several else values
