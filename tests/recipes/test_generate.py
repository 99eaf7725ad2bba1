"""recipes/generate on the student that comes with the project, by its command lines."""

import re
import sys
from pathlib import Path

import pytest

from spiking_mamba import event_driven
from spiking_mamba.common.machine import cores
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.model.tokenizer import load_tokenizer
from tests.helpers.commands import run

ROOT = Path(__file__).parents[2]
STUDENT = ROOT / "recipes/quickstart/student"
RECIPE = ("recipes/generate/generate.py", "recipes/generate/generate.yaml", "threads=1")
PROMPT = "The city lies on"

pytest.importorskip("numba")


def test_streams_and_says_what_it_fetched():
    found = run(*RECIPE, f"prompt={PROMPT}", "tokens=12", "temperature=0")
    assert found.returncode == 0, found.stderr
    text, _, last = found.stdout.strip().rpartition("\n")
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT)
    numbers = re.fullmatch(
        r"\[(\d+) tokens, (\d+) tokens/s, (\d+)% of the projections' int8 weights fetched, "
        r"([\d.]+) MB a token(?:, [\d.]+ mJ a token, the whole processor's)?, 1 thread\]",
        last,
    )
    assert numbers, last
    assert int(numbers[1]) == 12
    assert 50 < int(numbers[3]) < 75  # its card says 0.62


def test_sampling_repeats_itself_and_torch_says_the_same():
    how = ("tokens=8", "seed=3", "temperature=0.8")
    first, again, torch_way = (
        run(*RECIPE, *how, *more).stdout.rpartition("\n[")[0]
        for more in ((), ("prompt=The city lies on",), ("weights=null",))
    )
    assert first == again
    assert first[: len(PROMPT)] == torch_way[: len(PROMPT)] == PROMPT  # other weights, other words


def test_a_folder_of_an_event_driven_model(tmp_path):
    event_driven(load_model(STUDENT), "int4").save_pretrained(tmp_path)
    load_tokenizer(STUDENT).save_pretrained(tmp_path)
    found = run(*RECIPE, f"model={tmp_path}", "tokens=3", "temperature=0")
    assert "int4 weights fetched" in found.stdout, found.stderr
    for asked in ("weights=int8", "weights=null", "states=bfloat16"):
        said = one_line(run(*RECIPE, f"model={tmp_path}", asked))
        assert f"error: {asked}: {tmp_path} is an event-driven model already" in said
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    assert one_line(run(*RECIPE, f"model={tmp_path}")).startswith("error: ")


def test_a_model_of_chats_is_asked():
    recipe = ("recipes/generate/generate.py", "recipes/generate/generate.yaml", "temperature=0", "tokens=12")
    question = ("model=weights/smollm2-spiking", "prompt=What is the capital of France?", "weights=null")
    asked = run(*recipe, *question, "chat=true")
    assert "The capital of France is Paris." in asked.stdout, asked.stderr
    ended = run(*recipe, *question)
    assert "chat=true asks it a question" in ended.stderr


def one_line(found) -> str:
    assert found.returncode != 0
    (line,) = [line for line in found.stderr.strip().splitlines() if "error: " in line]
    assert "Traceback" not in found.stderr
    return line


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("weights=int2", "weights must be 'auto', 'int8'"),
        ("states=int8", "states must be 'auto', 'float32'"),
        (f"threads={cores() + 1}", f"threads must be from 1 to {cores()}"),
        ("tokens=0", "tokens must be an integer of at least 1"),
        ("top_p=2", "top_p"),
        ("prompt= ", "prompt must not be empty"),
        ("model=./nowhere", "nowhere"),
        ("chat=true", "no chat template"),
        ("temprature=1", "did you mean 'temperature'?"),
    ],
)
def test_bad_input_in_one_line(key, text):
    assert text in one_line(run(*RECIPE, key))


def test_numba_missing(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['numba'] = None\n")
    assert sys.modules.get("numba", True) is not None
    found = run(*RECIPE, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert "needs numba" in one_line(found)
