"""The rl recipes: real command lines, on two processes, killed and resumed."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import neurons
from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.common.records import read_records
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.data.tokens import train_tokenizer
from spiking_mamba.training.preference import PreferenceSettings
from spiking_mamba.training.run import finish_run
from tests.helpers.commands import HELPERS, ROOT, run, torchrun

pytest.importorskip("trl")

RECIPE = ROOT / "recipes/rl"
STEPS = 5
FIRST = ("cats", "dogs", "foxes", "owls")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student, pairs to train on, others to judge by, and text."""
    folder = tmp_path_factory.mktemp("rl")
    draw = random.Random(0)

    def pairs(count):
        for _ in range(count):
            prompt = f"{draw.choice(FIRST)} met {draw.randrange(20)} {draw.choice(FIRST)}"
            ends = [f" and {draw.choice(FIRST)} {verb}" * draw.randrange(1, 3) for verb in ("ran", "sat")]
            yield {"prompt": prompt, "chosen": ends[0], "rejected": ends[1]}

    text = [f"Document {i}: {i % 7} {FIRST[i % 4]} ran and sat." for i in range(600)]
    (folder / "text.txt").write_text("\n\n".join(text))
    for name, count in (("train", 60), ("held_out", 30)):
        rows = [*pairs(count), {"prompt": "cats", "chosen": "", "rejected": " ran"}]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = train_tokenizer(text, 300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "head_dim": 16, "num_heads": 4}
    ends = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), 0)
    config = SpikingMambaConfig(**sizes, **ends, vocab_size=len(tokenizer), n_groups=1, chunk_size=16)
    dense = SpikingMambaForCausalLM(config).eval()
    finish_run(dense, tokenizer, folder, "teacher")
    finish_run(
        SpikingMambaForCausalLM.from_dense(dense, neuron=neurons.SILIFNode()), tokenizer, folder, "student"
    )
    return folder


def arguments(method, folder, *more):
    """Of the recipe, for eight rows a step wherever it runs."""
    return [
        RECIPE / "align.py",
        RECIPE / f"{method}.yaml",
        f"model={folder / 'student'}",
        f"data={folder / 'train.jsonl'}",
        f"held_out={folder / 'held_out.jsonl'}",
        f"text={folder / 'text.txt'}",
        "limit=null",
        "held_out_half=null",
        "length=40",
        "text_length=16",
        f"training.max_steps={STEPS}",
        "training.logging_steps=1",
        "training.save_steps=2",
        "training.warmup_steps=0",
        "training.learning_rate=1e-2",
        "training.bf16=false",
        "training.per_device_train_batch_size=8",
        "objective.beta=0.1",
        *more,
    ]


# what each method is run with, so that all options are run at least once
OPTIONS = {
    "dpo": ["sgc={mode: blend, schedule: linear}", "freeze_embeddings=false"],
    "kto": ["reference=precomputed"],
}


@pytest.fixture(scope="module", params=OPTIONS)
def one_process(request, folder):
    """A method, and the run of it that nobody disturbed."""
    output = folder / f"one-{request.param}"
    done = run(*arguments(request.param, folder, *OPTIONS[request.param], f"output={output}"))
    assert done.returncode == 0, done.stderr
    assert "61 rows read, 60 kept, bad: 1 empty completion" in done.stdout
    assert f"Held out, {folder / 'held_out.jsonl'}: 31 rows read, 30 kept, " in done.stdout
    assert "| preference accuracy, all, 30 items " in done.stdout
    return request.param, output


TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "num_tokens", "train_loss")


def log(folder):
    """All that is logged but times, and what trl counts anew after every start."""
    rows = json.loads((folder / "log.json").read_text())
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def weights(folder):
    return load_file(folder / "model/model.safetensors")


def test_the_results(one_process, folder):
    method, output = one_process
    results = json.loads((output / "results.json").read_text())
    assert results["method"] == method
    assert results["rows"] == results["rows"] | {"read": 61, "kept": 60, "truncated": 0}
    assert results["held_out"]["bad"]["empty completion"] == 1
    assert (results["held_out"]["half"], results["held_out"]["half_seed"]) == (None, 0)
    assert results["before"]["perplexity"] > 1
    assert results["after"]["mean_abs"] > 0
    assert results["change"]["accuracy"]["sum"]["average"]["items"] == 30
    assert results["provenance"]["settings"]["model"] == str(folder / "student")
    rows = [row for row in log(output) if "loss" in row]
    assert len(rows) == STEPS
    assert all(row["mean_abs_spike"] > 0 for row in rows)
    expected = [1.0, 0.8, 0.6, 0.4, 0.2] if method == "dpo" else [0.0] * STEPS
    assert [row["sgc_lambda"] for row in rows] == pytest.approx(expected)
    assert not json.loads((output / "model/config.json").read_text())["sgc"]


def test_a_killed_run_goes_on_bit_for_bit(one_process, folder, tmp_path):
    method, output = one_process
    moment = {"dpo": "step", "kto": "_save_rng_state"}[method]
    command = arguments(method, folder, *OPTIONS[method], f"output={tmp_path / 'run'}")
    done = run(HELPERS / "killed.py", moment, *command)
    assert done.returncode == -9
    assert not (tmp_path / "run/model").exists()
    done = run(*command, "resume=true")
    assert done.returncode == 0, done.stderr
    assert ("checkpoint-4 is incomplete" in done.stderr) is (moment != "step")
    assert log(tmp_path / "run") == log(output)
    one, two = weights(tmp_path / "run"), weights(output)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    results, undisturbed = (json.loads((f / "results.json").read_text()) for f in (tmp_path / "run", output))
    assert results["after"] == undisturbed["after"]


def test_two_processes_train_as_one(one_process, folder, tmp_path):
    method, output = one_process
    options = [*OPTIONS[method], "training.per_device_train_batch_size=4", f"output={tmp_path / 'run'}"]
    done = torchrun(*arguments(method, folder, *options))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| preference accuracy, all") == 1
    kept = ("loss", "kl", "grad_norm", "sgc_lambda", "learning_rate")
    found, expected = (
        [{key: row[key] for key in kept if key in row} for row in log(f) if "loss" in row]
        for f in (tmp_path / "run", output)
    )
    assert len(found) == STEPS
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    start = load_file(folder / "student/model.safetensors")
    alone, together = weights(output), weights(tmp_path / "run")
    for name, weight in alone.items():  # AdamW makes much of the last bits of small gradients
        assert (together[name] - weight).norm() <= 1e-3 * (weight - start[name]).norm(), name


def test_the_dense_control_takes_the_same_command(folder, tmp_path):
    command = arguments("dpo", folder, f"model={folder / 'teacher'}", f"output={tmp_path / 'run'}")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "mean |s|" not in done.stdout
    assert json.loads((tmp_path / "run/model/config.json").read_text())["neuron"] is None


def test_refused_rows_are_one_line(folder, tmp_path):
    done = run(*arguments("dpo", folder, "bad_rows=refuse", f"output={tmp_path / 'run'}"))
    assert done.returncode != 0
    assert "1 empty completion" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_sources_scale():
    settings = parse_settings(PreferenceSettings, [str(RECIPE / "mamba2-1.3b-dpo.yaml")])
    assert (settings.data, settings.split) == ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs")
    arguments = settings.make_arguments()
    assert arguments.max_length == settings.length == 2048
    assert settings.end_of_text
    assert settings.freeze_embeddings
    assert settings.sgc is not None
    assert arguments.loss_type == ["sigmoid"]


def test_a_method_has_its_own_settings(capsys):
    assert parse_settings(PreferenceSettings, [str(RECIPE / "kto.yaml")]).method == "kto"
    with pytest.raises(SystemExit):
        parse_settings(PreferenceSettings, [str(RECIPE / "dpo.yaml"), "objective.desirable_weight=2"])
    assert "desirable_weight" in capsys.readouterr().err


def table_module(monkeypatch):
    spec = importlib.util.spec_from_file_location("rl_table", RECIPE / "table.py")
    table = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, table)
    spec.loader.exec_module(table)
    return table


def test_the_table_over_seeds(folder, tmp_path, monkeypatch):
    changes = [
        word.replace("training.max_steps=5", "training.max_steps=2") for word in arguments("dpo", folder)[3:]
    ]
    command = [
        RECIPE / "table.py",
        RECIPE / "table.yaml",
        f"teacher={folder / 'teacher'}",
        f"student={folder / 'student'}",
        f"output={tmp_path / 'table'}",
        f"changes={json.dumps(changes)}",
        "seeds=[0,1]",
        "tasks=[]",
        f"corpora=[{folder / 'text.txt'}]",
        "limit=20",
    ]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    recipe = table_module(monkeypatch)
    records = read_records(tmp_path / "table/table.jsonl")
    found = recipe.quantities(records)
    accuracy = found["preference accuracy, average"]
    assert {name: row["runs"] for name, row in accuracy.items()} == {
        "teacher": 1, "student": 1, "DPO": 2, "KTO": 2, "teacher, DPO": 2
    }  # fmt: skip
    single = json.loads((tmp_path / "table/student-dpo-1/results.json").read_text())
    assert single["provenance"]["settings"]["seed"] == 1
    shares = [
        json.loads((tmp_path / f"table/student-dpo-{seed}/results.json").read_text())["after"]["accuracy"][
            "sum"
        ]
        for seed in (0, 1)
    ]
    assert accuracy["DPO"]["mean"] == pytest.approx(sum(s["average"] for s in shares) / 2)
    assert set(found["mean_abs"]) == set(found["gain_fp32"]) == {"student", "DPO", "KTO"}
    assert found[f"perplexity:{folder / 'text.txt'}"]["teacher, DPO"]["runs"] == 2
    assert [record["kind"] for record in records] == ["run"] * 6 + ["model"] * 8
    assert not any("log" in record for record in records)
    table = (tmp_path / "table/table.md").read_text()
    assert table.splitlines()[0].count("|") == 7
    assert table == recipe.to_markdown(records) + "\n"
    # what is there is not made again
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before.") == 6
    assert (tmp_path / "table/table.md").read_text() == table
    assert [r["group"] for r in read_records(tmp_path / "table/table.jsonl")] == [r["group"] for r in records]
    other = run(*command[:-1], "limit=20", f"changes={json.dumps([*changes, 'objective.beta=0.5'])}")
    assert other.returncode != 0
    assert "holds a run with other settings" in other.stderr


def test_ctrl_c_names_the_finished_runs(folder, tmp_path, monkeypatch):
    table = table_module(monkeypatch)
    models = {"teacher": str(folder / "teacher"), "student": str(folder / "student")}
    settings = table.TableSettings(**models, output=str(tmp_path), seeds=[0, 1], tasks=[])

    def run(one):
        if Path(one.output).name.endswith("1"):
            raise KeyboardInterrupt
        Path(one.output).mkdir()
        Path(one.output, "results.json").touch()
        return dict.fromkeys(table.OF_A_RUN) | {"provenance": {"settings": {"seed": one.seed}}}

    monkeypatch.setattr(table, "run", run)
    with pytest.raises(KeyboardInterrupt) as caught:
        table.make_table(settings)
    assert caught.value.__notes__ == [f"1 of 6 runs in {tmp_path} are finished; the same command goes on."]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("batch_size=0", "batch_size must be an integer of at least 1"),
        ("tasks=[arc_esy]", "arc_easy"),
        ("kto=nosuch.yaml", "nosuch.yaml"),
        ("teacher=nosuch", "no checkpoint folder nosuch"),
        ("seeds=3", "seeds must be a list of integers"),
        ("results=3", "results must be a name or null"),
        ("results=pyproject.toml", "pyproject.toml, line 1 is no record"),
        ("changes=x", "changes must be a list"),
        ("corpora=[nowhere.txt]", "No such file: nowhere.txt"),
        ("changes=[objective.beta=-1,treshold=1]", "treshold"),
    ],
)
def test_the_table_says_what_is_wrong_before_its_first_run(folder, tmp_path, wrong, said):
    models = [
        f"teacher={folder / 'teacher'}",
        f"student={folder / 'student'}",
        f"output={tmp_path / 'table'}",
    ]
    done = run(RECIPE / "table.py", RECIPE / "table.yaml", *models, "tasks=[]", wrong)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "table").exists()
