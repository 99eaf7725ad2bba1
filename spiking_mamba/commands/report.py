"""Write and print the report of a finished run anew: spiking-mamba report RUN."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spiking_mamba.commands.configuration import command_settings
from spiking_mamba.common.errors import DataError, fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.schema import Name, schema
from spiking_mamba.reports.decoding import speed_table
from spiking_mamba.reports.evaluation import write_evaluation_report
from spiking_mamba.reports.preferences import summary
from spiking_mamba.reports.quickstart import write_report


@schema
class ReportSettings:
    """What is reported.

    Attributes:
        run: folder of a quickstart, of an evaluation, of a preference optimisation or of a bench: the one
            that holds ``results.json``. Of the first two ``report.md``, ``report.html`` and pictures are
            written there.
    """

    run: Name


# what results of each kind have, and none of the others
_WRITERS: dict[str, Callable[[Path, dict[str, Any]], str]] = {
    "gap_closed": write_report,
    "groups": write_evaluation_report,
    "change": lambda folder, results: summary(results),
    "decoding": lambda folder, results: speed_table(results),
}


def report(folder: Path) -> str:
    """Write the report of the results in a folder; return its tables.

    Raises:
        DataError: there are no results of a kind that is known.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise DataError(f"There is no {path}: the run has not finished, or is none that has a report.")
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    for key, write in _WRITERS.items():
        if isinstance(results, dict) and key in results:
            try:
                return write(folder, results)
            except (KeyError, TypeError) as error:
                raise DataError(f"{path} lacks what a report needs: {error}") from error
    raise DataError(f"{path} holds results of no quickstart, evaluation, preference optimisation or bench.")


@fail_clearly()
def main(description: str | None = __doc__) -> None:
    """Read the command line and run."""
    words = sys.argv[1:]
    if words and not words[0].startswith("-") and "=" not in words[0] and not Path(words[0]).is_file():
        words[0] = f"run={json.dumps(words[0])}"
    settings = command_settings(ReportSettings, "report", description, words)
    quiet()
    folder = Path(settings.run)
    print(report(folder))
    if written := [str(path) for path in (folder / "report.md", folder / "report.html") if path.exists()]:
        print(f"\nReport: {', '.join(written)}")


if __name__ == "__main__":
    main()
