"""The short form of the storms that `make storm` runs in full."""

import re

from tests.helpers.commands import ROOT, run


def test_a_few_kills_of_each_kind_lose_nothing():
    done = run(ROOT / "tests/storm/kills.py", "--short")
    assert done.returncode == 0, done.stderr[-3000:]
    counts = {line[7:].rstrip(): int(line[:5]) for line in done.stdout.splitlines()}
    kinds = {kind.partition(",")[0] for kind in counts}
    assert kinds >= {"training", "finished", "overwriting", "evaluation"}
    [kills] = [number for kind, number in counts.items() if re.match(r"kills in \d+ s", kind)]
    assert kills >= 15
    assert counts["lost more than the last unsaved steps"] == 0
