"""Compiled functions on disk: found by the next process, whatever was damaged or changed meanwhile."""

import os
from pathlib import Path

import pytest

from tests.helpers.commands import run

pytest.importorskip("numba")

CODE = """
import sys
from pathlib import Path
from neurons.cpu.disk_cache import keep_on_disk
from neurons.cpu.events import compiled

def make(key):
    @compiled
    def inner(x):
        return x + key

    @compiled
    def outer(x):
        return 2 * inner(x)

    keep_on_disk(outer, key, [Path(name) for name in sys.argv[1:]])
    return outer

for key in (1, 20):
    function = make(key)
    print(function(3), sum(function.stats.cache_hits.values()), sum(function.stats.cache_misses.values()))
"""


@pytest.fixture
def found(tmp_path):
    """What the functions of two keys give in a process of its own, and how many were found and compiled."""
    source = tmp_path / "source.py"
    source.write_text("a = 1")

    def found():
        script = tmp_path / "script.py"
        script.write_text(CODE)
        done = run(script, source, fresh=True, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]

    return found


def files(tmp_path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_the_next_process_compiles_nothing(found, tmp_path):
    assert found() == [(8, 0, 1), (46, 0, 1)]
    kept = files(tmp_path)
    assert len(kept) == 2
    assert found() == [(8, 1, 0), (46, 1, 0)]
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    kept[1].write_bytes(b"no pickle")
    assert found() == [(8, 0, 1), (46, 0, 1)]
    assert found() == [(8, 1, 0), (46, 1, 0)]


def test_other_sources_are_other_functions_and_the_former_ones_go(found, tmp_path):
    found()
    before = files(tmp_path)
    (tmp_path / "source.py").write_text("a = 2")
    assert found() == [(8, 0, 1), (46, 0, 1)]
    after = files(tmp_path)
    assert len(after) == 2
    assert not set(before) & set(after)


def test_a_place_that_cannot_be_written_is_no_error(found, tmp_path):
    assert found()
    for path in files(tmp_path):
        path.unlink()
        folder = path.parent
    folder.chmod(0o500)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write everywhere")
        assert [value for value, *_ in found()] == [8, 46]
    finally:
        folder.chmod(0o700)
