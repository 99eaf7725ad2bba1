"""Recipe settings: a YAML file and command-line overrides, checked against a documented dataclass."""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

__all__ = ["is_list_of", "load_yaml", "parse_settings", "reject_unknown_keys", "set_dotted"]

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML whose ``1e-3`` is a number, as in YAML 1.2; PyYAML reads a string unless a point is in it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(text: str) -> Any:
    """What ``text`` says, plain data only; ``1e-3`` is a number."""
    return yaml.load(text, _Loader)


def reject_unknown_keys(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise a ValueError for the first key of ``given`` that is not ``known``; it names the nearest one."""
    known = tuple(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
            raise ValueError(f"Unknown key {key!r} in {where}; {hint}")


def is_list_of(value: Any, kind: type) -> bool:
    """Whether ``value`` is a list or tuple, perhaps empty, of nothing but ``kind``; true is no ``int``."""
    return isinstance(value, list | tuple) and all(type(each) is kind for each in value)


def set_dotted(settings: dict[str, Any], dotted: str, value: Any) -> None:
    """Set ``a.b.c`` in nested mappings; those on the way are copied, so that others may share them."""
    *parents, last = dotted.split(".")
    for parent in parents:
        child = settings.get(parent)
        settings[parent] = settings = dict(child) if isinstance(child, Mapping) else {}
    settings[last] = value


def _overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """``key=value``, ``--key=value``, ``--key value`` and a bare ``--flag``; values are YAML."""
    found, rest = {}, list(arguments)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--"):
                raise ValueError(f"Expected key=value or --key value, got {word!r}.")
            value = rest.pop(0) if rest and not rest[0].startswith("--") and "=" not in rest[0] else "true"
        # "-" and "_" are the same in option names, as argparse's users expect
        found[key.replace("-", "_")] = load_yaml(value)
    return found


def _checked(cls: type[T], given: Mapping[str, Any], where: str) -> T:
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    reject_unknown_keys(given, fields, where)
    missing = [
        name
        for name, field in fields.items()
        if name not in given
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} must set {', '.join(missing)}.")
    return cls(
        **{name: _number(fields[name].type, value, f"{where}: {name}") for name, value in given.items()}
    )


def _number(kind: Any, value: Any, where: str) -> Any:
    """Check a scalar against its annotation; YAML reads 1 as an integer."""
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if kind in (int, float, str, bool, dict) and not (
        isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
    ):
        raise ValueError(f"{where} must be {kind.__name__}, got {value!r}.")
    return value


def parse_settings(cls: type[T], arguments: Sequence[str] | None = None, description: str | None = None) -> T:
    """Read ``CONFIG.yaml [key=value | --key value ...]`` from the command line into the dataclass ``cls``.

    Nested keys are written with dots, ``training.learning_rate=1e-3``. The file comes first, overrides
    win. An unknown key is an error that names the nearest known one.

    Args:
        cls: a dataclass whose fields are the allowed keys; a field with a ``__post_init__`` check raises
            there.
        arguments: ``sys.argv[1:]`` by default.
        description: shown by ``--help``.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys: " + ", ".join(f.name for f in dataclasses.fields(cls)),  # type: ignore[arg-type]
    )
    parser.add_argument(
        "config", help="YAML file; any of its keys can be overridden: key=value or --key value"
    )
    known, rest = parser.parse_known_args(arguments)
    try:
        path = Path(known.config)
        if not path.is_file():
            raise ValueError(f"There is no settings file {path}.")
        settings = load_yaml(path.read_text()) or {}
        if not isinstance(settings, dict):
            raise ValueError(f"{path} is no mapping of keys to values.")
        reject_unknown_keys(settings, (f.name for f in dataclasses.fields(cls)), str(path))  # type: ignore[arg-type]
        for key, value in _overrides(rest).items():
            set_dotted(settings, key, value)
        return _checked(cls, settings, str(path))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        parser.error(str(error))
