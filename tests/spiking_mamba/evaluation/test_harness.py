"""lm-eval's model: any checkpoint form, the scores of lm-eval's own, padding, clear errors."""

import json
import math
import shutil

import lm_eval
import lm_eval.tasks
import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

import spiking_mamba.evaluation.harness  # noqa: F401, registers the model
from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.common.errors import CheckpointError
from spiking_mamba.data.text import load_text
from spiking_mamba.data.tokens import train_tokenizer
from spiking_mamba.evaluation import tasks as tasks_module
from spiking_mamba.evaluation.harness import SpikingMambaLM
from spiking_mamba.evaluation.scoring import score
from spiking_mamba.evaluation.tasks import draw_items, zero_shot_tasks
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.spikes.counting import count_spikes
from tests.helpers.commands import run
from tests.helpers.tiny import INTEGER

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 16,
    "state_size": 8,
    "n_groups": 1,
    "chunk_size": 16,
    "tie_word_embeddings": True,
    "initializer_range": 0.5,  # far from uniform, so that scores differ
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(load_text("openwebtext-passages")["text"][:100], vocab_size=512)


@pytest.fixture(scope="module")
def dense(tokenizer, tmp_path_factory):
    """A folder of transformers' Mamba2."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    Mamba2ForCausalLM(Mamba2Config(**SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def spiking(dense, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spiking")
    SpikingMambaForCausalLM.from_dense(dense, neuron=INTEGER).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def state_spaces(dense, tmp_path_factory):
    """The same weights as state-spaces publishes them."""
    folder = tmp_path_factory.mktemp("state-spaces")
    weights = Mamba2ForCausalLM.from_pretrained(dense).state_dict()
    weights = {key.replace("embeddings.", "embedding."): value for key, value in weights.items()}
    torch.save(weights, folder / "pytorch_model.bin")
    config = {"d_model": 32, "n_layer": 2, "vocab_size": 512, "ssm_cfg": {"layer": "Mamba2"}}
    (folder / "config.json").write_text(json.dumps(config | {"tie_embeddings": True}))
    return folder


def evaluate(model, folder, tasks, monkeypatch, **arguments):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip and lscpu: slow
    arguments = "".join(f",{key}={value}" for key, value in arguments.items())
    return lm_eval.simple_evaluate(
        model=model,
        model_args=f"pretrained={folder}{arguments}",
        tasks=list(tasks.values()),
        limit=12,
        batch_size=5,
        device="cpu",
        bootstrap_iters=0,
        task_manager=tasks_module._task_manager(lm_eval.tasks, list(tasks)),
    )["samples"]


def test_scores_equal_those_of_lm_evals_own_model(dense, monkeypatch):
    tasks = zero_shot_tasks(["arc_easy", "boolq", "lambada_openai", "winogrande"])
    ours, theirs = (evaluate(name, dense, tasks, monkeypatch) for name in ("spiking_mamba", "hf"))
    spread = set()
    for task in tasks:
        assert len(ours[task]) == 12
        for one, other in zip(ours[task], theirs[task], strict=True):
            assert one["doc_hash"] == other["doc_hash"]
            assert one["arguments"] == other["arguments"]
            mine, reference = ([float(response[0][0]) for response in s["resps"]] for s in (one, other))
            assert mine == pytest.approx(reference, abs=1e-4)
            spread.update(mine)
            for metric in {"acc", "acc_norm"} & set(one["metrics"]):
                assert one[metric] == other[metric]
    assert max(spread) - min(spread) > 10  # the comparison is not one of constants


def test_state_spaces_form(dense, state_spaces, monkeypatch):
    tasks = zero_shot_tasks(["copa"])
    ours = evaluate("spiking_mamba", state_spaces, tasks, monkeypatch, tokenizer=dense)
    theirs = evaluate("hf", dense, tasks, monkeypatch)
    for one, other in zip(ours["copa"], theirs["copa"], strict=True):
        scores = [[float(response[0][0]) for response in sample["resps"]] for sample in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_a_spiking_folder(spiking, dense, monkeypatch):
    tasks = zero_shot_tasks(["copa"])
    found = [evaluate("spiking_mamba", folder, tasks, monkeypatch) for folder in (spiking, dense)]
    resps = [[float(r[0][0]) for sample in samples["copa"] for r in sample["resps"]] for samples in found]
    assert resps[0] != pytest.approx(resps[1], abs=1e-2)  # it does spike
    model = load_model(spiking)
    assert model.config.neuron == INTEGER
    assert not model.training


def test_padding_adds_no_spikes(spiking):
    """Batches of 1 have none, so the counts of larger ones show whether it is left out."""
    [task] = zero_shot_tasks("arc_easy").values()
    found = {}
    for batch_size in (1, 6):
        lm = SpikingMambaLM(spiking, batch_size=batch_size)
        with count_spikes(lm.model) as counts:
            scores = score(lm, task, limit=6)
        found[batch_size] = counts.to_dict(), scores
    rows, alone = (found[size][0]["projections"] for size in (6, 1))
    for name in alone:
        assert rows[name]["tokens"] == alone[name]["tokens"] > 0
        assert rows[name]["mean_abs"] == pytest.approx(alone[name]["mean_abs"], rel=1e-3)
    assert found[1][1]["items"] == found[6][1]["items"]


def test_padding_is_told_from_a_token_of_its_id(spiking, tokenizer):
    """Id 0 is lm-eval's padding, and "!" to GPT-2's tokenizer, also as the last token of an input."""
    lm = SpikingMambaLM(spiking, batch_size=4)
    pairs = [([5, 6, 7, 8], [9, 3]), ([5, 6, 0], [0, 4]), ([7], [0, 3]), ([0], [0, 0, 8]), ([0], [2])]
    with count_spikes(lm.model) as counts:
        found = lm._loglikelihood_tokens([(("", ""), *pair) for pair in pairs], disable_tqdm=True)
    assert {p.tokens for p in counts.projections.values()} == {5 + 4 + 2 + 3 + 1}
    for (context, continuation), (likelihood, _) in zip(pairs, found, strict=True):
        with torch.no_grad():
            logits = lm.model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        at = range(len(context) - 1, len(context) + len(continuation) - 1)
        assert likelihood == pytest.approx(
            sum(float(logits[i, t]) for i, t in zip(at, continuation, strict=True)), abs=1e-4
        )


def test_the_counted_tokens_are_those_that_were_scored(spiking, tokenizer):
    """Spikes and scores come from the same passes: each prompt once, all but its last token."""
    [task] = zero_shot_tasks("lambada_openai").values()
    lm = SpikingMambaLM(spiking, batch_size=3)
    with count_spikes(lm.model) as counts:
        items = score(lm, task, limit=5)["drawn"]["items"]
    lengths = [len(tokenizer(doc["text"])["input_ids"]) - 1 for doc in task.eval_docs.select(items)]
    assert {p.tokens for p in counts.projections.values()} == {sum(lengths)}


def test_bfloat16_is_autocast(dense):
    [task] = zero_shot_tasks("copa").values()
    seen = []
    for dtype in ("float32", "bfloat16"):
        lm = SpikingMambaLM(dense, dtype=dtype)
        seen.append(lm._model_call(torch.tensor([[5, 6, 7]])))
        assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.float32}
        assert score(lm, task, limit=2)["n"] == 2
    assert not torch.equal(seen[0], seen[1].float())
    torch.testing.assert_close(seen[0], seen[1].float(), rtol=0.1, atol=0.5)


def test_generation(dense):
    from lm_eval.api.instance import Instance

    requests = [
        Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 4}), i)
        for i, text in enumerate(["one two", "a much longer prompt than the first"])
    ]
    texts = [
        SpikingMambaLM(dense, batch_size=size).generate_until(requests, disable_tqdm=True) for size in (1, 2)
    ]
    assert texts[0] == texts[1]


def test_nan_names_the_first_item(dense, tokenizer):
    [task] = zero_shot_tasks("copa").values()
    items = draw_items(task, 20)["items"]
    task.build_all_requests(samples=items)
    read = {number: set() for number in items}
    for instance in task.instances:
        read[items[instance.doc_id]].update(tokenizer("".join(instance.args))["input_ids"][:-1])
    word = min(read[items[4]].difference(*(read[number] for number in items[:4])))
    model = load_model(dense)

    def poison(module, args, kwargs, output):
        output.logits[(kwargs["input_ids"] == word).any(1)] = math.nan

    model.register_forward_hook(poison, with_kwargs=True)
    with pytest.raises(FloatingPointError, match=rf"NaN in copa, item {items[4]}\."):
        score(SpikingMambaLM(model, tokenizer), task, limit=20)


class TestErrors:
    def test_no_tokenizer(self, state_spaces):
        with pytest.raises(CheckpointError, match=r"holds no tokenizer.*tokenizer="):
            SpikingMambaLM(state_spaces)

    def test_the_folder_of_a_run(self, dense, tmp_path):
        shutil.copytree(dense, tmp_path / "run/model")
        with pytest.raises(CheckpointError, match=r"whose model is .*run/model"):
            SpikingMambaLM(tmp_path / "run")
        with pytest.raises(CheckpointError, match=r"whose model is .*run/model"):
            load_tokenizer(tmp_path / "run")

    def test_a_broken_tokenizer(self, dense, tmp_path):
        shutil.copytree(dense, tmp_path / "broken")
        (tmp_path / "broken/tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match="broken"):
            SpikingMambaLM(tmp_path / "broken")

    def test_another_models_tokenizer(self, dense):
        larger = train_tokenizer(load_text("openwebtext-passages")["text"][:100], vocab_size=600)
        with pytest.raises(CheckpointError, match="outside the vocabulary of 512"):
            SpikingMambaLM(dense, tokenizer=larger)

    def test_options(self, dense):
        with pytest.raises(ValueError, match="did you mean 'max_length'"):
            SpikingMambaLM(dense, max_lenght=3)
        with pytest.raises(ValueError, match="float32"):
            SpikingMambaLM(dense, dtype="float16")
        with pytest.raises(ValueError, match="needs a tokenizer"):
            SpikingMambaLM(load_model(dense))

    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(CheckpointError, match="nothing"):
            SpikingMambaLM(tmp_path / "nothing")


TASK = """
task: animals
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


# without what takes a minute: its own tasks, 14,000 files, and what pip and lscpu say
QUICKLY = """
import functools, lm_eval.evaluator, lm_eval.tasks
from spiking_mamba.evaluation.__main__ import main
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
lm_eval.evaluator.add_env_info = lambda results: None
main()
"""


def test_lm_evals_own_command_line(spiking, tmp_path):
    items = [
        {"question": "A cat", "choices": ["sleeps", "flies away"], "answer": 0},
        {"question": "The old owl", "choices": ["swims", "sees"], "answer": 1},
    ]
    (tmp_path / "items.json").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "animals.yaml").write_text(TASK % (tmp_path / "items.json"))
    assert "--model_args" in run("-m", "spiking_mamba.evaluation", "run", "--help").stdout
    command = ["-c", QUICKLY, "run", "--model", "spiking_mamba"]
    command += ["--tasks", "animals", "--include_path", tmp_path, "--device", "cpu"]
    output = ["--output_path", tmp_path / "found", "--log_samples"]
    done = run(*command, "--model_args", f"pretrained={spiking}", *output)
    assert done.returncode == 0, done.stderr
    assert "|animals|" in done.stdout
    [samples] = (tmp_path / "found").rglob("samples_animals_*.jsonl")
    model, tokenizer = load_model(spiking), load_tokenizer(spiking)
    for sample in map(json.loads, samples.read_text().splitlines()):
        for choice, (found, _) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            context, whole = (
                tokenizer(text)["input_ids"]
                for text in (sample["doc"]["question"], f"{sample['doc']['question']} {choice}")
            )
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            by_hand = sum(logits[i - 1, whole[i]] for i in range(len(context), len(whole)))
            assert float(found) == pytest.approx(float(by_hand), abs=1e-3)
    wrong = run(*command, "--model_args", "pretrained=./no/such")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in wrong.stderr
