"""What a command reads: a YAML file of the user's or one that comes with the package, and overrides.

In a checkout the package's files lie in ``recipes``; a wheel has them beside this module, under the same
names (``setup.py``).
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from spiking_mamba.common.settings import parse_settings

__all__ = ["CONFIGURATIONS", "command_settings", "home", "located"]

T = TypeVar("T")
RECIPES = "recipes"
# of each command, by the name that the command line may call it
CONFIGURATIONS = {
    "quickstart": ["recipes/quickstart/quickstart.yaml"],
    "pretrain": ["recipes/teacher/tiny.yaml", "recipes/teacher/teacher.yaml"],
    "distill": [
        "recipes/distill/tiny.yaml",
        "recipes/distill/mamba2-130m.yaml",
        "recipes/distill/mamba2-1.3b.yaml",
    ],
    "align": ["recipes/rl/dpo.yaml", "recipes/rl/kto.yaml", "recipes/rl/mamba2-1.3b-dpo.yaml"],
    "evaluate": ["recipes/evaluate/evaluate.yaml"],
    "generate": ["recipes/generate/generate.yaml"],
    "bench": ["recipes/benchmark/bench.yaml"],
}


def home() -> Path:
    """The folder that ``recipes`` lies in."""
    installed = Path(__file__).parent
    return installed if (installed / RECIPES).is_dir() else Path(__file__).parents[2]


def located(value: Any) -> Any:
    """Names below ``recipes``, such as the quickstart's teacher, as this machine has them.

    Args:
        value: of a setting; names within lists and mappings are found, too.

    Returns:
        The same, but for names that are not there from where the command runs and come with the package.
    """
    if isinstance(value, list):
        return [located(each) for each in value]
    if isinstance(value, dict):
        return {key: located(each) for key, each in value.items()}
    if not isinstance(value, str) or not value.startswith(f"{RECIPES}/") or Path(value).exists():
        return value
    found = home() / value
    return str(found) if found.exists() else value


def command_settings(
    cls: type[T],
    command: str,
    description: str | None,
    arguments: Sequence[str] | None = None,
    as_mapping: Mapping[str, Callable[[Any], dict[str, str]]] = MappingProxyType({}),
) -> T:
    """A command's settings: ``[CONFIGURATION] [key=value | --key value ...]``.

    Args:
        cls: of the settings, see :func:`spiking_mamba.common.settings.parse_settings`.
        command: where it has one of :data:`CONFIGURATIONS`, that one need not be named; where it has none,
            the file may be left out.
        description: shown by ``--help``.
        arguments: ``sys.argv[1:]`` by default.
        as_mapping: of keys whose values are names of things, what names them as the user did, wherever they
            are found.
    """
    known = {Path(name).stem: name for name in CONFIGURATIONS.get(command, [])}
    words = list(sys.argv[1:] if arguments is None else arguments)
    if known:
        words = words if {"-h", "--help"} & set(words) else _with_file(words, known)
        names = ", ".join(known)
        description = f"{description or ''}\n\nconfigurations that come with the package, by name: {names}"
    settings = parse_settings(cls, words, description, optional=not known)
    given = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.init}  # type: ignore[arg-type]
    moved = {
        key: located(as_mapping[key](value)) if key in as_mapping else at
        for key, value in given.items()
        if (at := located(value)) != value
    }
    return dataclasses.replace(settings, **moved) if moved else settings  # type: ignore[type-var]


def _with_file(words: list[str], known: dict[str, str]) -> list[str]:
    """The command line with a file first."""
    first = words[0] if words else ""
    if Path(first).is_file():
        return words
    if first in known:
        return [str(home() / known[first]), *words[1:]]
    if not first or first.startswith("-") or "=" in first:
        if len(known) == 1:
            return [str(home() / name) for name in known.values()] + words
        _end(f"Name a configuration, a YAML file or one that comes with the package: {', '.join(known)}.")
    if not Path(first).suffix and Path(first).name == first:
        _end(f"{first} is no file, and no configuration that comes with the package: {', '.join(known)}.")
    return words


def _end(said: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: error: {said}", file=sys.stderr)
    sys.exit(2)
