"""Files of records: whole lines, none lost, whoever writes and whatever stops them."""

import json
import math
import multiprocessing
from pathlib import Path

import pytest

from spiking_mamba.common.records import put_record, read_records, to_json

FORK = multiprocessing.get_context("fork")  # which has all of torch imported


def write(path, row, count):
    for number in range(count):
        put(path, row, number, text="x" * 2000)


def writer(*arguments):
    process = FORK.Process(target=write, args=arguments, daemon=True)
    process.start()
    return process


def put(path, row, seed, **others):
    put_record(path, {"row": row, "seed": seed, **others}, ("row", "seed"))


def test_a_record_replaces_its_elder_in_place(tmp_path):
    path = tmp_path / "new/table.jsonl"
    assert read_records(path) == []
    put(path, "a", 0, value=0.1)
    put(path, "a", 1, value=0.2)
    put(path, "b", 0, value={"nested": [1, None]})
    before = path.read_text().splitlines()
    put(path, "a", 1, value=1 / 3)
    after = path.read_text().splitlines()
    assert [after[0], after[2]] == [before[0], before[2]]
    assert read_records(path)[1] == {"row": "a", "seed": 1, "value": 1 / 3}  # to the last bit
    assert [p.name for p in path.parent.iterdir()] == ["table.jsonl"]


def test_lines_of_others_keep_their_bytes(tmp_path):
    path = tmp_path / "table.jsonl"
    path.write_text('{"row":"a",   "seed": 0, "value": 1.50}\n')
    put(path, "b", 0)
    assert path.read_text().splitlines()[0] == '{"row":"a",   "seed": 0, "value": 1.50}'


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    path = tmp_path / "table.jsonl"
    running = [writer(path, name, 40) for name in "abcd"]
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0] * 4
    found = [(record["row"], record["seed"]) for record in read_records(path)]
    assert sorted(found) == [(name, number) for name in "abcd" for number in range(40)]
    for name in "abcd":  # each process's in its own order
        assert [seed for row, seed in found if row == name] == list(range(40))


def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    path = tmp_path / "table.jsonl"
    put(path, "first", 0)
    for _ in range(5):
        process = writer(path, "a", 100_000)
        while len(read_records(path)) < 5:  # every read meanwhile is whole, too
            assert process.is_alive()
        process.kill()
        process.join(60)
        assert path.read_text().endswith("\n")
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    put(path, "last", 0)
    assert [record["row"] for record in read_records(path)] == ["first", "a", "last"]


def test_what_cannot_be_written_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "table.jsonl"
    put(path, "a", 0)
    before = path.read_text()
    with pytest.raises(TypeError):
        put(path, "b", 0, value=object())
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        put(path, "b", 0)
    assert path.read_text() == before


@pytest.mark.parametrize("damage", ['{"row": "b", "se', "[1, 2]", "3", ""])
def test_a_damaged_line_is_named_and_left(tmp_path, damage):
    path = tmp_path / "table.jsonl"
    path.write_text(json.dumps({"row": "a", "seed": 0}) + f"\n{damage}\n")
    before = path.read_text()
    with pytest.raises(ValueError, match=r"table\.jsonl, line 2 is no record"):
        read_records(path)
    with pytest.raises(ValueError, match="line 2 is no record"):
        put(path, "b", 0)
    assert path.read_text() == before


def test_json_has_no_numbers_that_are_none():
    found = {"a": [1.5, math.inf, (math.nan, 2)], 3: {"b": -math.inf}, "c": "Infinity", "d": True, "e": None}

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(to_json(found), parse_constant=refuse)
    assert read == {"a": [1.5, None, [None, 2]], "3": {"b": None}, "c": "Infinity", "d": True, "e": None}
    assert math.isinf(found["a"][1])  # what is written is a copy
