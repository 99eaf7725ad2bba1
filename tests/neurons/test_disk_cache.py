"""Compiled functions on disk: found by the next process, whatever was damaged or changed meanwhile."""

import os
import subprocess
import sys
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
    def inner(x):  # long enough, and called often enough, to stay a function of its own
        total = 0
        for i in range(x):
            total += key
            while total % 7 == 3:
                total += 1
        return total

    @compiled
    def outer(x):
        return inner(x) + inner(x + 1) * inner(x * 3)

    keep_on_disk(outer, key, [Path(name) for name in sys.argv[2:]])
    return outer

for key in map(int, sys.argv[1].split(",")):
    function = make(key)
    print(function(3), sum(function.stats.cache_hits.values()), sum(function.stats.cache_misses.values()))
"""


def value(key: int) -> int:
    def inner(x: int) -> int:
        total = 0
        for _ in range(x):
            total += key
            while total % 7 == 3:
                total += 1
        return total

    return inner(3) + inner(4) * inner(9)


@pytest.fixture
def found(tmp_path):
    """What the functions of some keys give in a process of its own, and how many were found and compiled."""
    source = tmp_path / "source.py"
    source.write_text("a = 1")

    def found(keys="1,20"):
        script = tmp_path / "script.py"
        script.write_text(CODE)
        done = run(script, keys, source, fresh=True, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]

    return found


def files(tmp_path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_the_next_process_compiles_nothing(found, tmp_path):
    assert found() == [(value(1), 0, 1), (value(20), 0, 1)]
    kept = files(tmp_path)
    assert len(kept) == 2
    assert found() == [(value(1), 1, 0), (value(20), 1, 0)]
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    kept[1].write_bytes(b"no pickle")
    assert found() == [(value(1), 0, 1), (value(20), 0, 1)]
    assert found() == [(value(1), 1, 0), (value(20), 1, 0)]


def test_what_two_processes_kept_stays_apart_in_a_third(found):
    """Alike but for what they close over: numba numbers functions by the process, the linker goes by name."""
    for key in (1, 20, 5):
        assert found(str(key)) == [(value(key), 0, 1)]
    together = [(value(20), 1, 0), (value(5), 1, 0), (value(1), 1, 0), (value(7), 0, 1)]
    assert found("20,5,1,7") == together


def test_other_sources_are_other_functions_and_the_former_ones_go(found, tmp_path):
    found()
    before = files(tmp_path)
    (tmp_path / "source.py").write_text("a = 2")
    assert found() == [(value(1), 0, 1), (value(20), 0, 1)]
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
        assert [value for value, *_ in found()] == [value(1), value(20)]
    finally:
        folder.chmod(0o700)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_numbers_its_functions_anew():
    code = """
import os
import subprocess
import sys
from neurons.cpu import disk_cache
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, str(next(disk_cache.FunctionIdentity._unique_ids)).encode())
    os._exit(0)
os.wait()
print(abs(int(os.read(reader, 99)) - next(disk_cache.FunctionIdentity._unique_ids)) > 10**6)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"
