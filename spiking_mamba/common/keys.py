"""Keys of mappings: the known ones, and those with dots."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["reject_unknown_keys", "set_dotted", "shown", "unknown_key"]

LONGEST = 60  # characters of a value in an error


def shown(value: Any) -> str:
    """A value as an error shows it: part of a line, however long it is."""
    text = value if isinstance(value, str) else repr(value)
    text = f"{text[:LONGEST]}..." if len(text) > LONGEST else text
    return repr(text) if isinstance(value, str) else text


def reject_unknown_keys(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise a ValueError for the first key of ``given`` that is not ``known``; it names the nearest one."""
    if (unknown := unknown_key(given, known)) is not None:
        raise ValueError(f"Unknown key {unknown[0]} in {where}; {unknown[1]}")


def unknown_key(given: Iterable[Any], known: Iterable[str]) -> tuple[str, str] | None:
    """The first key that is not ``known``, and a hint at what may be meant; None where all are."""
    known = tuple(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key)[:LONGEST], known, n=1, cutoff=0.4)
            most = f"{', '.join(known[:30])}{', ...' if len(known) > 30 else '.'}"
            return shown(key), f"did you mean {near[0]!r}?" if near else f"known are {most}"
    return None


def set_dotted(settings: dict[str, Any], dotted: str, value: Any) -> None:
    """Set ``a.b.c`` in nested mappings; those on the way are copied, so that others may share them.

    Raises:
        ValueError: a key on the way has a value that is no mapping.
    """
    *parents, last = dotted.split(".")
    for number, parent in enumerate(parents):
        child = settings.get(parent)
        if child is not None and not isinstance(child, Mapping):
            within = ".".join(parents[: number + 1])
            raise ValueError(f"{within} is no mapping but {shown(child)}: {shown(dotted)} cannot be set.")
        settings[parent] = settings = dict(child or {})
    settings[last] = value
