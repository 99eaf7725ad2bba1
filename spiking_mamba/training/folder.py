"""The folder of a run: one process at a time, its settings, and what an earlier run has left there."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from spiking_mamba.common.claims import LOCK, claim_folder
from spiking_mamba.common.errors import RunError
from spiking_mamba.common.files import PART, refuse_above, remove_whole, sweep, unused, write_whole
from spiking_mamba.common.progress import say
from spiking_mamba.common.settings import shorter
from spiking_mamba.training.processes import on_first_process

__all__ = ["COMPLETE", "HISTORY", "kept_in", "run_folder", "start_run"]

SETTINGS = "settings.yaml"
MARK = "# spiking_mamba: settings of a run by "  # and its kind: the first line of the file
HISTORY = "log.json"
COMPLETE = "complete"  # in a checkpoint that is
# All that a recipe writes into its folder: nothing else there is removed.
WRITES = (
    f"{PREFIX_CHECKPOINT_DIR}-*",
    *("model", HISTORY, "rows", "student", "runs"),
    *("results.json", "report.md", "report.png", "report.html", "perplexity.png"),
    SETTINGS,
)
_ASKED = ("resume", "overwrite", "dry_run")  # of the settings: how a run is begun, not what it is
_whole_process = contextlib.ExitStack()  # claims of start_run
_claimed_here: set[Path] = set()


@contextlib.contextmanager
def run_folder(settings: Any, resume: bool, overwrite: bool) -> Iterator[Path]:
    """The folder of a run, this process's alone within the block, with its settings in it.

    Args:
        settings: a dataclass with a field ``output``; its class is the kind of the run.
        resume: go on with the run in that folder, whose settings must be the same.
        overwrite: remove what a run of this kind has written there.

    Raises:
        RunError: the folder holds something else, another process is at it, or there is nothing to resume;
            nothing was written.
    """
    folder = Path(settings.output)
    with contextlib.ExitStack() as stack:
        on_first_process(_take, folder, settings, resume, overwrite, stack)
        yield folder


def start_run(settings: Any, resume: bool, overwrite: bool) -> Path:
    """As :func:`run_folder`, for as long as this process lives."""
    folder = Path(settings.output)
    if folder.resolve() in _claimed_here:
        on_first_process(_begin, folder, settings, resume, overwrite)
        return folder
    _whole_process.enter_context(run_folder(settings, resume, overwrite))
    _claimed_here.add(folder.resolve())
    return folder


def _take(folder: Path, settings: Any, resume: bool, overwrite: bool, stack: contextlib.ExitStack) -> None:
    _plan(folder, settings, resume, overwrite)  # or the claim would make a folder for nothing
    stack.enter_context(claim_folder(folder))
    _begin(folder, settings, resume, overwrite)


def _begin(folder: Path, settings: Any, resume: bool, overwrite: bool) -> None:
    """Make the folder that of these settings; it is claimed."""
    plan = _plan(folder, settings, resume, overwrite)
    if plan == "overwrite":
        _empty(folder)
    if plan == "begin" and resume:
        say(f"{folder} holds no run to go on with: one begins.")
    if plan != "resume" or _written_by(folder) is None:  # by a version that wrote no mark
        mark = f"{MARK}{type(settings).__name__}\n"
        write_whole(folder / SETTINGS, mark + yaml.safe_dump(_plain(settings), sort_keys=False))
    sweep(folder, WRITES)


def _plan(folder: Path, settings: Any, resume: bool, overwrite: bool) -> str:
    """Whether to 'begin', 'resume' or 'overwrite'; raises a RunError where none of it can be."""
    if resume and overwrite:
        raise RunError("resume and overwrite exclude each other.")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file: choose another output.")
    if unused(folder, [LOCK]):
        return "begin"
    if resume:
        _check_same(folder, _plain(settings))
        return "resume"
    if not overwrite:
        raise RunError(
            f"{folder} already holds files: choose another output, or say resume=true or overwrite=true."
        )
    if (kind := _written_by(folder)) != type(settings).__name__:
        what = "holds no run" if kind is None else f"was written by {kind}, not by {type(settings).__name__}"
        raise RunError(f"{folder} is not empty and {what}: it is left as it is.")
    refuse_above(folder, "overwrite=true")
    reads = {key: value for key, value in _plain(settings).items() if key != "output"}
    for name in _texts(reads):
        if _is_emptied(folder, name):
            raise RunError(
                f"overwrite=true would remove {name}, which this run reads: choose another output."
            )
    return "overwrite"


def _texts(value: Any) -> Iterator[str]:
    """All that is text in settings, which may be the name of something that a run reads."""
    if isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _texts(below)
    elif isinstance(value, str) and value:
        yield value


def _is_emptied(folder: Path, name: str) -> bool:
    """Whether :func:`_empty` would remove that path, or what it stands for, or a part of it."""
    try:
        path, folder = Path(name).resolve(), folder.resolve()
        if not path.exists():
            return False
    except (OSError, ValueError):  # no path at all
        return False
    if path == folder:
        return True
    if not path.is_relative_to(folder):
        return False
    first = path.relative_to(folder).parts[0]
    return any(fnmatchcase(first, pattern) for pattern in WRITES)


def _written_by(folder: Path) -> str | None:
    """The class of the settings of the run that wrote the folder; None where none has."""
    try:
        first = (folder / SETTINGS).read_text().partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return None
    return first.removeprefix(MARK) if first.startswith(MARK) else None


def _plain(settings: Any) -> dict[str, Any]:
    """The settings as ``settings.yaml`` holds them."""
    plain = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    return {key: value for key, value in plain.items() if key not in _ASKED}


def _check_same(folder: Path, plain: dict[str, Any]) -> None:
    kept = folder / SETTINGS
    if not kept.is_file():
        raise RunError(f"{folder} holds no run to resume: it has no {SETTINGS}.")
    try:
        before = yaml.safe_load(kept.read_text())
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise RunError(f"{folder} holds no run to resume: {kept} cannot be read.") from error
    if not isinstance(before, dict):
        raise RunError(f"{folder} holds no run to resume: {kept} is no mapping.")
    changed = sorted(_changed(before | {"output": None}, plain | {"output": None}))  # it may have been moved
    if changed:
        raise RunError(f"{folder} holds a run with other settings of {', '.join(changed)}.")


def _changed(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """The keys that differ, of mappings those below them, and what a single value was: 'a.b (it was 3)'.

    A key that is younger than the run, and false, changes nothing.
    """
    for key in {str(key) for key in before.keys() | now.keys()}:
        old, new = before.get(key), now.get(key)
        if key not in before and new is False:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from (f"{key}.{below}" for below in _changed(old, new))
        elif old != new:
            long = isinstance(old, dict | list)
            yield key if long else f"{key} (it was {shorter(json.dumps(old, default=str))})"


def _empty(folder: Path) -> None:
    """Remove what runs write; the settings stay until others take their place: a kill leaves a run."""
    names = [entry for entry in folder.iterdir() if entry.name not in (LOCK, SETTINGS)]
    foreign = []
    for entry in sorted(names):
        if any(fnmatchcase(entry.name, pattern) for pattern in WRITES):
            remove_whole(entry)
        elif not entry.name.endswith(PART):
            foreign.append(entry.name)
    if foreign:
        print(f"{folder}: left as they are: {', '.join(foreign)}", file=sys.stderr)


def kept_in(folder: Path) -> str:
    """What a training that is interrupted now leaves in its folder, and how to go on, in a sentence."""
    marks = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")
    steps = [mark.parent.name.rpartition("-")[2] for mark in marks]
    complete = [int(step) for step in steps if step.isdecimal()]
    if (model := folder / "model").is_dir():  # a finished run has one
        way = "resume=true does the rest" if complete else "without a checkpoint: resume=true trains it again"
        return f"{model} is trained and stays; {way}."
    if complete:
        return f"{folder} holds the checkpoint of step {max(complete)}; resume=true goes on from there."
    return f"nothing trained is kept in {folder}; start again with overwrite=true."
