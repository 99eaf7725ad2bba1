"""Claims of folders: one process at a time, free again however it ends, and nothing of a kill stays."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from spiking_mamba.common import claims
from spiking_mamba.common.claims import (
    LOCK,
    ClaimedError,
    claim_folder,
    claimed,
    scratch_folder,
    whole_folder,
)
from spiking_mamba.common.files import PART, remove_whole, replace_folder, sweep, unused, write_whole
from tests.helpers.commands import ROOT

HOLD = """
import sys, time
from pathlib import Path
from spiking_mamba.common.claims import {name}
with {name}({arguments}) as found:
    print(found, flush=True)
    time.sleep(60)
"""


def held(name, *arguments):
    """A process that holds a claim, and what it got."""
    script = HOLD.format(name=name, arguments=", ".join(arguments))
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_another_process_is_refused_until_the_first_one_ends(tmp_path, end):
    folder = tmp_path / "run"
    process, _ = held("claim_folder", f"Path({str(folder)!r})")
    with pytest.raises(ClaimedError, match=f"Another process is at {folder}"), claim_folder(folder):
        pass
    process.send_signal(end)
    process.wait()
    with claim_folder(folder):
        assert not list(folder.iterdir())


def work(begun):
    begun.set()
    time.sleep(60)


def test_a_worker_that_outlives_its_parent_holds_nothing(tmp_path):
    """As of a data loader whose process is killed."""
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()
    with claimed(tmp_path / "lock") as free:
        assert free
        worker = fork.Process(target=work, args=(begun,))
        worker.start()
        begun.wait()
    with claimed(tmp_path / "lock") as free:
        assert free
    worker.kill()
    worker.join()


def test_a_claim_is_whose_it_is_within_one_process_too(tmp_path):
    before = set(claims._open)
    with claimed(tmp_path / "lock") as first, claimed(tmp_path / "lock") as second:
        assert (first, second) == (True, False)
    assert claims._open == before


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(claims.fcntl, "flock", refuse)
    with claimed(tmp_path / "lock") as free:
        assert free
    assert "cannot be locked" in capsys.readouterr().err


def test_a_folder_on_nfs_is_locked_by_a_file_in_it(tmp_path, monkeypatch):
    """Where only what is open for writing can be locked."""
    lock = claims.fcntl.flock

    def flock(descriptor, how):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EBADF, "Bad file descriptor")
        return lock(descriptor, how)

    monkeypatch.setattr(claims.fcntl, "flock", flock)
    with claim_folder(tmp_path), pytest.raises(ClaimedError), claim_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_what_a_kill_leaves_of_a_scratch_folder_goes_with_the_next(tmp_path):
    process, folder = held("scratch_folder", f"Path({str(tmp_path)!r})", "'.download-'")
    (tmp_path / "mine").mkdir()
    with scratch_folder(tmp_path, ".download-") as own:
        assert os.path.isdir(folder)  # its process lives
        assert own.is_dir()
    assert not own.exists()
    process.kill()
    process.wait()
    (tmp_path / ".download-of-an-earlier-version").mkdir()
    with scratch_folder(tmp_path, ".download-") as own:
        assert not os.path.exists(folder)
        assert {path.name for path in tmp_path.iterdir()} == {"mine", own.name}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_drafts_are_no_use_of_a_folder(tmp_path):
    assert unused(tmp_path / "absent")
    (tmp_path / f"settings.yaml{PART}").touch()
    (tmp_path / f"model{PART}").mkdir()
    assert unused(tmp_path)
    (tmp_path / LOCK).touch()
    assert not unused(tmp_path)
    assert unused(tmp_path, [LOCK])
    assert not unused(tmp_path / LOCK)
    sweep(tmp_path, ["model", "log.json"])
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, f"settings.yaml{PART}"}


def test_a_folder_takes_the_place_of_another(tmp_path):
    for name in ("draft", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "draft", tmp_path / "target")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["target", "target/draft"]


@pytest.mark.parametrize("there", [True, False])
def test_a_kill_while_a_folder_takes_the_place_of_another(tmp_path, there):
    (tmp_path / "model.old.part").mkdir()
    (tmp_path / "model.old.part/old").touch()
    if there:
        (tmp_path / "model").mkdir()
    sweep(tmp_path, ["model"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model/old").exists() != there


def test_of_a_link_the_link_alone_is_removed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/precious").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    remove_whole(tmp_path / "link")
    remove_whole(tmp_path / "absent")
    assert [path.name for path in tmp_path.rglob("*")] == ["elsewhere", "precious"]


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    write_whole(tmp_path / "a", "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a", "\ud800")
    assert (tmp_path / "a").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("there", [False, True])
def test_a_whole_folder_has_its_name_at_the_end(tmp_path, there):
    folder = tmp_path / "made" / "folder"
    if there:
        folder.mkdir(parents=True)
    with whole_folder(folder) as draft:
        draft.mkdir()
        (draft / "a").write_text("1")
        assert folder.exists() == there
    assert (folder / "a").read_text() == "1"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_was_not_finished_is_none(tmp_path):
    def fail():
        with whole_folder(tmp_path / "folder") as draft:
            draft.mkdir()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []
