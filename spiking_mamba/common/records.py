"""Records of runs: a JSON object a line, in a file that several processes may add to.

put_record(Path("runs/table.jsonl"), {"row": "control", "seed": 0, "perplexity": 17.3}, ("row", "seed"))
"""

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spiking_mamba.common.files import write_whole

__all__ = ["finite", "put_record", "read_records", "to_json"]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, in its order; none where there is no file.

    Raises:
        ValueError: names the line that is no record.
    """
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def put_record(path: Path, record: Mapping[str, Any], identity: Sequence[str]) -> None:
    """Add a record at the end, or in the place of the one of the same identity.

    The file is written whole or not at all, and no record of another process is lost: it is held meanwhile.

    Args:
        path: made, with its folder, if it is not there.
        record: what JSON can express.
        identity: the keys by whose values a record is told from the others.

    Raises:
        ValueError: the file holds a line that is no record; it stays as it is.
    """
    new = json.dumps(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _held(path):
        lines = path.read_text().splitlines()
        for place, line in enumerate(lines):
            old = _parse(line, f"{path}, line {place + 1}")
            if all(old.get(key) == record.get(key) for key in identity):
                lines[place] = new
                break
        else:
            lines.append(new)
        write_whole(path, "".join(f"{line}\n" for line in lines))


def finite(value: Any) -> Any:
    """``value`` with null for what JSON cannot say: NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(results: Any) -> str:
    """JSON that every reader takes, see :func:`finite`, for people to look into."""
    return json.dumps(finite(results), indent=1, allow_nan=False)


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no record: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no record: it must be a JSON object.")
    return record


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Keep other processes from the file, which is there from now on, until the block or the process ends."""
    while True:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # whoever held it may have put another file in its place: that one is to be held then
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return
