"""Recipe settings: a YAML file and command-line overrides, checked against a documented schema."""

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spiking_mamba.common.keys import reject_unknown_keys, set_dotted, shown
from spiking_mamba.common.words import described, hints_of
from spiking_mamba.common.yaml_text import load_yaml, read_yaml

__all__ = ["parse_settings", "shorter"]

T = TypeVar("T")
LONGEST = 500  # characters of an error


class _OnTheCommandLine(ValueError):
    """A word there cannot be read."""


def _overrides(arguments: Sequence[str], texts: Collection[str]) -> dict[str, Any]:
    """``key=value``, ``--key=value``, ``--key value`` and a bare ``--flag``.

    Values are YAML, but of ``texts``, which are taken as they are typed.
    """
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if (not equals and not word.startswith("--")) or not all(key.split(".")):
            raise _OnTheCommandLine(f"Expected key=value or --key value, got {shown(word)}.")
        # "-" and "_" are the same in option names, as argparse's users expect
        key = key.replace("-", "_")
        if not equals:
            own = rest and not rest[0].startswith("--") and (key in texts or "=" not in rest[0])
            value = rest.pop(0) if own else "true"
        if key in texts:
            overrides[key] = value
            continue
        try:
            overrides[key] = load_yaml(value)
        except ValueError as error:
            raise _OnTheCommandLine(f"{shown(word)}: {error}") from None
    return overrides


def _is_override(words: Sequence[str]) -> bool:
    """Whether there is no word, or the first is a key."""
    return not words or words[0].startswith("--") or ("=" in words[0] and not Path(words[0]).is_file())


def parse_settings(
    cls: type[T],
    arguments: Sequence[str] | None = None,
    description: str | None = None,
    optional: bool = False,
) -> T:
    """Read ``CONFIG.yaml [key=value | --key value ...]`` from the command line into ``cls``.

    Nested keys are written with dots, ``training.learning_rate=1e-3``. The file comes first, overrides
    win. An unknown key is an error that names the nearest known one. What is refused ends the program with
    one line and status 2.

    Args:
        cls: made by :func:`spiking_mamba.common.schema.schema`.
        arguments: ``sys.argv[1:]`` by default.
        description: shown by ``--help``, before every key with its type, its default and its meaning.
        optional: whether the file may be left out.
    """
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s [-h] {'[config]' if optional else 'config'} [key=value | --key value ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Values are YAML; a text, such as a prompt, is taken as it is typed.\n\nkeys:\n"
        + "\n".join(described(cls)).replace("%", "%%"),
        allow_abbrev=False,
    )
    parser.add_argument(
        "config", help="YAML file; any of its keys can be overridden: key=value or --key value"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    # without a file the first word is a key, unless it asks for help
    left_out = optional and not {"-h", "--help"} & set(given) and _is_override(given[:1])
    known, rest = (argparse.Namespace(config=""), given) if left_out else parser.parse_known_args(given)
    try:
        settings = None if left_out else read_yaml(Path(known.config))
        if settings is None:
            settings = {}
        hints = hints_of(cls)  # type: ignore[arg-type]  # classes are hashable
        if not isinstance(settings, dict):
            raise ValueError(f"{known.config} is no mapping of keys to values.")
        reject_unknown_keys(settings, hints, known.config)
        texts = [key for key, hint in hints.items() if hint is str]
        for key, value in _overrides(rest, texts).items():
            set_dotted(settings, key, value)
        reject_unknown_keys(settings, hints, known.config or "the command line")
        return cls(**settings)
    except (ValueError, TypeError) as error:
        said = " ".join(str(error).split())
        # "" is in everything, and what is wrong with a word of the command line names it
        where = "" if known.config in said or isinstance(error, _OnTheCommandLine) else f"{known.config}: "
        parser.exit(2, f"{parser.prog}: error: {where}{shorter(said)}\n")


def shorter(text: str) -> str:
    """What an error says, cut where it is longer than anybody reads."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
