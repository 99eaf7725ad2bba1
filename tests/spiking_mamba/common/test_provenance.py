"""The commit that a result names: that of the code, whatever was recorded meanwhile."""

import subprocess
from pathlib import Path

import pytest

from spiking_mamba.common.errors import RunError
from spiking_mamba.common.provenance import commit_of, is_clean, refuse_changed_code


@pytest.fixture
def checkout(tmp_path):
    """Code and a page, committed."""
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "code.py").write_text("a = 1\n")
    (tmp_path / "docs/results/table.jsonl").write_text("{}\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    return tmp_path


def head(checkout):
    command = ["git", "-C", checkout, "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_recording_a_result_changes_no_code(checkout):
    (checkout / "docs/results/table.jsonl").write_text('{}\n{"row": "new"}\n')
    (checkout / "runs").mkdir()
    (checkout / "runs/student").touch()
    assert commit_of(checkout) == head(checkout)
    assert is_clean(commit_of(checkout))


@pytest.mark.parametrize("staged", [False, True])
def test_changed_code_is_told(checkout, staged):
    (checkout / "code.py").write_text("a = 2\n")
    if staged:
        subprocess.run(["git", "-C", checkout, "add", "."], check=True)
    assert commit_of(checkout) == head(checkout) + "-dirty"
    assert not is_clean(commit_of(checkout))


def test_a_long_run_names_the_code_that_it_began_with(checkout):
    first = commit_of(checkout)
    (checkout / "code.py").write_text("a = 2\n")
    assert commit_of(checkout) == first


def test_without_a_checkout_no_commit_is_known(checkout):
    (checkout / "installed").mkdir()
    assert commit_of(checkout / "installed") is None  # not that of the folder above
    assert not is_clean(None)


def test_pages_are_made_of_committed_code_alone(checkout, tmp_path_factory, monkeypatch):
    results = checkout / "docs/results/table.jsonl"
    refuse_changed_code(results, checkout)
    commit_of.cache_clear()
    (checkout / "code.py").write_text("a = 2\n")
    monkeypatch.chdir(checkout)
    elsewhere = tmp_path_factory.mktemp("runs")
    (elsewhere / "link").symlink_to(checkout / "docs")
    for path in (results, Path("docs/results"), elsewhere / "link/results/new.jsonl"):
        with pytest.raises(RunError, match="commit first, or have the results elsewhere"):
            refuse_changed_code(path, checkout)
    refuse_changed_code(elsewhere / "table.jsonl", checkout)
    refuse_changed_code(checkout / "runs/docs", checkout)
