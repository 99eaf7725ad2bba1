"""Finished measurements: found again, never mixed up, never lost."""

import json
import shutil

import pytest
import torch

from spiking_mamba.common import provenance
from spiking_mamba.evaluation import measuring
from spiking_mamba.evaluation.cache import ResultsCache
from spiking_mamba.evaluation.settings import EvaluationSettings
from tests.helpers.commands import ROOT

KEY = {"weights": "abc", "limit": 4}
RESULT = {"acc": 0.1 + 0.2, "items": [1, 0], "nothing": None}


@pytest.fixture
def cache(tmp_path):
    return ResultsCache(tmp_path / "cache")


def refuse():
    raise AssertionError("measured again")


def test_found_again_and_exact(cache):
    assert cache.get("copa", KEY, lambda: RESULT) == (RESULT, False)
    assert cache.get("copa", KEY, refuse) == (RESULT, True)
    assert [path.suffix for path in cache.folder.iterdir()] == [".json"]  # no draft is left


@pytest.mark.parametrize("other", [KEY | {"limit": 5}, KEY | {"limit": None}, {"weights": "abc"}])
def test_another_key_is_another_measurement(cache, other):
    cache.get("copa", KEY, lambda: RESULT)
    assert cache.get("copa", other, lambda: {"acc": 1}) == ({"acc": 1}, False)
    assert cache.get("copa", KEY, refuse) == (RESULT, True)


def test_names_are_no_paths(cache, tmp_path):
    cache.get("../../text/my file.txt", KEY, lambda: RESULT)
    assert [path.parent for path in tmp_path.rglob("*.json")] == [cache.folder]


def test_nothing_is_kept_of_a_measurement_that_failed(cache):
    def fail():
        raise FloatingPointError("NaN")

    with pytest.raises(FloatingPointError):
        cache.get("copa", KEY, fail)
    assert not cache.folder.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("0.30000000000000004", "0.9"),
        lambda text: text.replace('"limit": 4', '"limit": 5'),
        lambda text: json.dumps({"key": KEY, "result": {"acc": 1.0}}),
        lambda text: b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_kept_and_measured_again(cache, capsys, damage):
    cache.get("copa", KEY, lambda: RESULT)
    path = cache.path("copa", KEY)
    for number in (1, 2):
        broken = damage(path.read_text())
        path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
        content = path.read_bytes()
        assert cache.get("copa", KEY, lambda: RESULT) == (RESULT, False)
        aside = path.with_name(path.name + (".damaged" if number == 1 else ".damaged-2"))
        assert aside.read_bytes() == content
        assert str(path) in capsys.readouterr().err
    assert cache.get("copa", KEY, refuse) == (RESULT, True)


# --- the state of the code ---


def test_every_changed_line_is_another_state_of_the_code(tmp_path, monkeypatch):
    """A copy of the package, since nothing may change the one that runs."""
    for name in ("neurons", "spiking_mamba"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "spiking_mamba/common/provenance.py"))
    states = []
    for path, text in (
        (None, ""),
        (tmp_path / "spiking_mamba/model/scan.py", "\n# another line\n"),
        (tmp_path / "neurons/cupy/si_lif/kernel.cu", "\n// another line\n"),
        (tmp_path / "spiking_mamba/new.py", ""),
    ):
        if path is not None:
            with path.open("a") as file:
                file.write(text)
        provenance.code_state.cache_clear()
        states.append(provenance.code_state()["sha256"])
    provenance.code_state.cache_clear()
    assert len(set(states)) == len(states)
    monkeypatch.undo()
    assert provenance.code_state()["commit"] == provenance.commit_of(ROOT)


def test_results_are_of_one_state_of_the_code(monkeypatch, tmp_path):
    """The key that an evaluation makes, for two states."""
    monkeypatch.setattr(measuring, "weights_sha256", lambda folder: "0")
    monkeypatch.setattr(measuring, "tokenizer_sha256", lambda tokenizer: "0")
    monkeypatch.setattr(measuring, "file_sha256", lambda path: "0")
    monkeypatch.setattr("spiking_mamba.evaluation.harness.SpikingMambaLM", Model)
    settings = EvaluationSettings(models=["a"], tasks=["copa"])
    found = []
    for commit in ("1", "2"):
        monkeypatch.setattr(measuring, "code_state", lambda commit=commit: {"commit": commit, "sha256": "0"})
        measured = measuring.Measured(settings, None, tmp_path, None, ResultsCache(tmp_path), {}, None)
        found.append(measured.identity)
    assert found[0] != found[1]


class Model:
    device = torch.device("cpu")

    def __init__(self, *args, **kwargs):
        pass
