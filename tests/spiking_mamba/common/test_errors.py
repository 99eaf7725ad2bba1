"""One clear line and exit status 1 for what a user or a machine does."""

import errno
import os
import subprocess
import sys

import pytest
import tokenizers
import torch
from safetensors import SafetensorError

from spiking_mamba.common.errors import DataError, DivergedError, RunError, fail_clearly
from tests.helpers.commands import ROOT, run


def panic():
    """Rust's PanicException, which is no Exception."""
    try:
        tokenizers.models.BPE(vocab={"a": 0}, merges=[], dropout=0.5).tokenize(None)
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise
    raise type("PanicException", (BaseException,), {})("capacity overflow")


def said(raise_it, capsys=None):
    with pytest.raises(SystemExit) as ended, fail_clearly():
        raise_it()
    text = ended.value.code
    assert isinstance(text, str)  # status 1
    assert text.startswith("error: ")
    assert "\n" not in text
    assert len(text) < 1200
    return text


def throw(error):
    def raise_it():
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b"), "/a/b: No space left on device"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/a"), "/a: Read-only file system"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/a"), "/a: Permission denied"),
        (
            OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"),
            "/a to /b: Invalid cross-device",
        ),
        (OSError("Can't load\nthe model"), "Can't load the model"),
        (RuntimeError("Could not determine home directory."), "Could not determine home directory."),
        (MemoryError(), "not enough memory"),
        (OverflowError("int too big to convert"), "int too big to convert"),
        (SafetensorError("Error while serializing: I/O error"), "Error while serializing: I/O error"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "CUDA out of memory. Tried to"),
        (RunError("a\n b"), "a b"),
        (DataError("x" * 10_000), "x ..."),
        (DivergedError("not finite"), "not finite"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_line_whatever_the_library(error, text):
    assert text in said(throw(error))


def test_a_panic_of_rust():
    assert "capacity overflow" in said(panic) or "error: " in said(panic)


@pytest.mark.parametrize("bad", [-5, 0, 10**12, 2**63, 2**70, "many"])
def test_a_bad_vocabulary_never_reaches_rust(bad):
    from spiking_mamba.data import train_tokenizer

    assert "vocab_size is" in said(lambda: train_tokenizer(["a"], bad))


@pytest.mark.parametrize("error", [RunError("a"), OSError(28, "b"), RuntimeError("c")])
def test_a_traceback_can_be_asked_for(error, monkeypatch):
    monkeypatch.setenv("SPIKING_MAMBA_TRACEBACK", "1")
    with pytest.raises(type(error)), fail_clearly():
        raise error


@pytest.mark.parametrize("error", [AttributeError("a"), KeyError("b"), AssertionError("c"), SystemExit(3)])
def test_faults_of_this_program_are_not_covered_up(error):
    with pytest.raises(type(error)), fail_clearly():
        raise error


PIPE = """
from spiking_mamba.common.errors import fail_clearly
with fail_clearly():
    for _ in range(100000):
        print("a line", flush=True)
"""


def test_a_reader_who_leaves_is_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-c", PIPE], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "error: Broken pipe\n"
    assert process.wait() == 1


LIMITED = """
import resource, sys
from pathlib import Path
import datasets, torch
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.training.distillation import distill
from tests.spiking_mamba.training.test_run import settings
from tests.helpers.tiny import tiny_model
rows = datasets.Dataset.from_dict({"input_ids": torch.zeros(40, 16, dtype=torch.int64).tolist()})
folder, size = sys.argv[1], int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # as if the disk were full from there on
with fail_clearly():
    distill(settings(Path(folder)), tiny_model(), rows=rows)
"""


@pytest.mark.parametrize("size", [10, 5_000, 60_000, 110_000])
def test_a_disk_that_is_full_at_any_file(size, tmp_path):
    """The settings, the weights (Rust), the optimiser's state (C++)."""
    done = run("-c", LIMITED, tmp_path / "run", size)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Writing model shards")]
    assert lines[-1].startswith("error: "), done.stderr[-2000:]
    assert "File too large" in lines[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/model").exists()
