"""A bar for what takes seconds: on a terminal, by the first process, gone when it is done."""

import io
import sys

import pytest

from spiking_mamba.common import progress


class Terminal(io.StringIO):
    """What looks like one, or does not."""

    def __init__(self, shows: bool) -> None:
        super().__init__()
        self.shows = shows

    def isatty(self) -> bool:
        return self.shows


@pytest.mark.parametrize(
    ("shows", "rank", "patience", "seen"),
    [(True, None, 0, True), (True, "0", 0, True), (True, "1", 0, False), (False, None, 0, False)]
    + [(True, None, 60, False)],
)
def test_a_bar_where_somebody_waits(shows, rank, patience, seen, monkeypatch):
    terminal = Terminal(shows)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_PATIENCE", patience)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert list(progress.watched(iter("abcd"), 4, "spelling")) == list("abcd")
    said = terminal.getvalue()
    assert ("spelling: " in said) == seen
    assert said.rpartition("\r")[0].rpartition("\r")[2].strip() == ""  # nothing stays
