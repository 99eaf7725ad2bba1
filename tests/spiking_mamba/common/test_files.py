"""Where results cannot be put: said before the work, not behind it."""

import os

import pytest

from spiking_mamba.common.errors import RunError
from spiking_mamba.common.files import refuse_file


def test_a_file_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below", "file/far/below"):
        with pytest.raises(RunError, match="is a file, no folder"):
            refuse_file(tmp_path / folder)
    for folder in ("new", "new/below"):
        refuse_file(tmp_path / folder)


def test_a_link_to_nothing_is_in_the_way(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for folder in ("link", "link/below"):
        with pytest.raises(RunError, match="symbolic link to what is not there"):
            refuse_file(tmp_path / folder)
    (tmp_path / "gone").mkdir()
    refuse_file(tmp_path / "link/below")


def test_a_place_that_may_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "read").mkdir()
    access = os.access
    locked = tmp_path / "read"
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked and access(path, mode))
    for folder in ("read", "read/new/below"):
        with pytest.raises(RunError, match="read may not be written"):
            refuse_file(tmp_path / folder)
    refuse_file(tmp_path / "beside")
    monkeypatch.chdir(locked)
    with pytest.raises(RunError, match="may not be written"):
        refuse_file(tmp_path / "read/runs")
