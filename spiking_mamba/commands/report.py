"""Write and print the report of a finished run anew, or of several side by side: spiking-mamba report RUN."""

import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spiking_mamba.commands.configuration import command_settings
from spiking_mamba.common.errors import DataError, fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.schema import Name, Names, schema
from spiking_mamba.reports.comparison import merged
from spiking_mamba.reports.decoding import speed_table
from spiking_mamba.reports.evaluation import write_evaluation_report
from spiking_mamba.reports.preferences import summary
from spiking_mamba.reports.quickstart import write_comparison, write_report


@schema
class ReportSettings:
    """What is reported.

    Attributes:
        run: folder of a quickstart, of an evaluation, of a preference optimisation or of a bench: the one
            that holds ``results.json``. Of the first two ``report.md``, ``report.html`` and pictures are
            written there. Several evaluations, or several quickstarts, are reported side by side, in
            ``output``.
        output: folder for the report of several runs; by default that of the run itself.
    """

    run: Names
    output: Name | None = None

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("run: name the folder of a run.")
        if len(self.run) > 1 and self.output is None:
            raise ValueError("output: several runs are reported in a folder of their own, output=NEW.")


class _Kind(NamedTuple):
    """What writes the report of a run's results, and of several by name."""

    one: Callable[[Path, dict[str, Any]], str]
    several: Callable[[Path, Mapping[str, dict[str, Any]]], str] | None


# what results of each kind have, and none of the others
_KINDS: dict[str, _Kind] = {
    "gap_closed": _Kind(write_report, write_comparison),
    "groups": _Kind(
        write_evaluation_report, lambda folder, runs: write_evaluation_report(folder, merged(runs))
    ),
    "change": _Kind(lambda folder, results: summary(results), None),
    "decoding": _Kind(lambda folder, results: speed_table(results), None),
}


def _read(folder: Path) -> tuple[str, dict[str, Any]]:
    """The kind of a run's results, and the results."""
    path = folder / "results.json"
    if not path.is_file():
        raise DataError(
            f"There is no {path}: the run has not finished, or is none that has a report, as distill, whose "
            "student evaluate measures."
        )
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    for kind in _KINDS:
        if isinstance(results, dict) and kind in results:
            return kind, results
    raise DataError(f"{path} holds results of no quickstart, evaluation, preference optimisation or bench.")


def report(folder: Path) -> str:
    """Write the report of the results in a folder; return its tables.

    Raises:
        DataError: there are no results of a kind that is known.
    """
    kind, results = _read(folder)
    try:
        return _KINDS[kind].one(folder, results)
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / 'results.json'} lacks what a report needs: {error}") from error


def report_together(folders: list[Path], output: Path) -> str:
    """Write the report of several runs, side by side, to a folder of its own; return its table.

    Raises:
        DataError: the runs are of several kinds, or of one that has no such report; ``output`` is a run's.
    """
    if (output / "results.json").exists():
        raise DataError(
            f"{output} is the folder of a run, whose own report would be lost: name another output."
        )
    read = [_read(folder) for folder in folders]
    kinds = {kind for kind, _ in read}
    write = _KINDS[read[0][0]].several
    if len(kinds) > 1 or write is None:
        raise DataError("Evaluations can be compared with evaluations, and quickstarts with quickstarts.")
    try:
        return write(output, dict(zip(_names(folders), (results for _, results in read), strict=True)))
    except (KeyError, TypeError) as error:
        raise DataError(
            f"One of {', '.join(map(str, folders))} lacks what a report needs: {error}"
        ) from error


def _names(folders: list[Path]) -> list[str]:
    """The folders without what all have in common; each of its own."""
    whole = [os.path.abspath(folder) for folder in folders]
    if len(set(whole)) < len(whole):
        raise DataError("A run is named twice: there is nothing to compare.")
    common = os.path.commonpath(whole)
    return [os.path.relpath(path, common) if path != common else Path(path).name for path in whole]


@fail_clearly()
def main(description: str | None = __doc__) -> None:
    """Read the command line and run."""
    words = sys.argv[1:]
    named = list(itertools.takewhile(lambda word: not word.startswith("-") and "=" not in word, words))
    if named and not Path(named[0]).is_file():  # a file is a configuration
        words = [f"run={json.dumps(named)}", *words[len(named) :]]
    settings = command_settings(ReportSettings, "report", description, words)
    quiet()
    folders = [Path(run) for run in settings.run]
    output = Path(settings.output or folders[0])
    print(report(output) if folders == [output] else report_together(folders, output))
    if written := [str(path) for path in (output / "report.md", output / "report.html") if path.exists()]:
        print(f"\nReport: {', '.join(written)}")


if __name__ == "__main__":
    main()
