"""Without a network a name that is no folder is told at once, and what the cache holds is read."""

import json
import socket
import time

import datasets
import pytest
from huggingface_hub import constants

from spiking_mamba.common import hub
from spiking_mamba.common.checkpoint_files import locate
from spiking_mamba.common.errors import CheckpointError, DataError
from spiking_mamba.data.preference_rows import load_preferences
from spiking_mamba.data.text import load_text
from spiking_mamba.model.source import load_source, load_source_tokenizer
from spiking_mamba.model.tokenizer import load_tokenizer
from tests.helpers.tiny import tiny_model


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No names are known, and nothing has been fetched."""

    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for kind in ("http", "https", "all"):
        for name in (f"{kind}_proxy", f"{kind}_proxy".upper()):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("load", [locate, load_tokenizer, load_source, load_source_tokenizer])
def test_a_mistyped_folder_is_told_at_once(load):
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="wights/smollm2-spiking"):
        load("wights/smollm2-spiking")
    assert time.perf_counter() - start < 5  # the hub's client tries for half a minute and more


def test_what_was_fetched_before_is_read(alone):
    snapshot = alone / "models--own--thing" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (alone / "models--own--thing" / "refs").mkdir()
    (alone / "models--own--thing" / "refs" / "main").write_text("abc")
    model = tiny_model()
    model.save_pretrained(snapshot)
    folder, settings = locate("own/thing")
    assert folder.samefile(snapshot)
    assert settings == json.loads((snapshot / "config.json").read_text())


def test_a_name_that_is_known_or_a_proxy_can_be_asked(monkeypatch, alone):
    assert hub.unreachable()
    monkeypatch.setenv("HTTPS_PROXY", "http://localhost:1")
    assert not hub.unreachable()
    monkeypatch.delenv("HTTPS_PROXY")
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_: asked.append(host) or [])
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example:8443/hub")
    assert not hub.unreachable()
    assert asked == ["mirror.example"]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("load", "instead"),
    [
        (load_text, "there are wikipedia-leads"),
        (lambda name: load_preferences(name, "train"), "there is answer"),
    ],
    ids=["text", "preferences"],
)
def test_a_mistyped_data_set_is_told_at_once(load, instead, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    start = time.perf_counter()
    with pytest.raises(DataError, match=f"wrong/name from the hub: it is no file here.*{instead}"):
        load("wrong/name")
    assert time.perf_counter() - start < 5
    (tmp_path / "wrong___name").mkdir()  # fetched before: the hub's client has its say
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": ["a"]})
    )
    assert load("wrong/name")
