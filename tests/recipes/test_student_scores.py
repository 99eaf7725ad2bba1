"""From a student's training to its scores, the shipped one, and recipes beside them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from spiking_mamba.common.files import file_sha256
from spiking_mamba.common.records import read_records
from spiking_mamba.data.benchmarks import BENCHMARK_SETS
from spiking_mamba.evaluation.outcomes import read_outcomes, write_outcomes
from spiking_mamba.model.checkpoint import load_dense
from tests.helpers.commands import run as run_command
from tests.helpers.converting import FOLDER
from tests.helpers.students import ROOT, lines, prepare


@pytest.fixture(scope="module")
def folder(convert, tmp_path_factory):
    return prepare(convert, tmp_path_factory.mktemp("students"))


def test_ability_and_what_is_kept_of_it(convert, tmp_path):
    names = np.array(["piqa", "lambada_openai", "sciq"])
    rows = [[0, item, choice, item % 4 == 0, 1, 1, 1] for item in range(8) for choice in range(2)]
    rows += [[1, item, 0, -1, 1, 1, 1] for item in range(4)]
    rows += [[2, item, choice, 3, 1, 1, 1] for item in range(4) for choice in range(4)]
    guess = convert.ability.guessing({"names": names, "requests": np.array(rows, np.int32)})
    assert guess == {"piqa": 0.75, "lambada_openai": 0.0, "sciq": 0.25}
    random = np.random.default_rng(0)
    teacher = {n: {m: random.random(4000) < 0.9 for m in ("acc", "acc_norm")} for n in names}
    student = {n: {m: v & (random.random(4000) < 0.9) for m, v in ms.items()} for n, ms in teacher.items()}
    by_hand = [sum(each[n]["acc"].mean() - guess[n] for n in ("piqa", "sciq")) for each in (student, teacher)]
    assert convert.ability.ability(student, guess, ["piqa", "sciq"]) == pytest.approx(by_hand[0])
    found = convert.ability.relative_ability(student, teacher, guess, ["piqa", "sciq"])
    assert found["kept"]["share"] == pytest.approx(by_hand[0] / by_hand[1], abs=1e-4)
    gap = teacher["piqa"]["acc"].astype(float) - student["piqa"]["acc"]
    assert found["gap"]["gap"] == pytest.approx(100 * gap.mean(), abs=1e-2)
    half = 1.96 * gap.std() / np.sqrt(4000) * 100
    assert found["gap"]["high"] - found["gap"]["low"] == pytest.approx(2 * half, rel=0.1)
    write_outcomes(tmp_path / "items.npz", student)
    back = read_outcomes(tmp_path / "items.npz")
    assert all(np.array_equal(back[n][m], v) for n, ms in student.items() for m, v in ms.items())
    with pytest.raises(ValueError, match="piqa has 3 and 4000 items"):
        convert.ability.relative_ability(student, {"piqa": {"acc": np.ones(3, bool)}}, guess, ["piqa"])


def command(script, yaml, *arguments):
    return run_command(ROOT / script, ROOT / "recipes/distill" / yaml, *arguments)


def test_from_training_to_scores(folder, tmp_path):
    """The commands of the page, at a small size: train, pack, score the teacher, the student and rivals."""
    start, run = f"start={folder}/dense", tmp_path / "run"
    small = [
        start,
        "own_text=[]",
        f"package_text=[{folder}/data/package_text.bin]",
        "rows=4",
        "piece=2",
        "group=16",
    ]
    small += ["length=32", "steps=4", "log_every=2", "compiles=false", "rank=4", f"output={run}"]
    done = command("recipes/convert/student.py", "smollm2-40.yaml", *small)
    assert done.returncode == 0, done.stderr
    assert lines(run)[-1]["nonzero"] == pytest.approx(0.41, abs=0.03)
    packed = tmp_path / "packed"
    done = command(
        "recipes/convert/pack_student.py", "pack.yaml", f"state={run}/state.pt", f"output={packed}"
    )
    assert "bytes in all" in done.stdout, done.stderr
    scores = tmp_path / "scores"
    common = [f"source={folder}/model", f"teacher={folder}/dense", f"data={folder}/data", f"output={scores}"]
    common += ["passages=2", "sets=[piqa,lambada_openai]"]
    rows = {
        "teacher": [f"model={folder}/dense", "against=null"],
        "s63": [f"model={run}/state.pt", f"against={scores}/teacher.npz"],
        "packed": [f"model={packed}", f"against={scores}/teacher.npz", f"reference={packed}"],
        "w4a8": [f"model={folder}/dense", "weights=4", "activations=8", f"against={scores}/teacher.npz"],
    }
    for name, arguments in rows.items():
        done = command("recipes/convert/score_student.py", "score.yaml", f"name={name}", *common, *arguments)
        assert done.returncode == 0, done.stderr
    found = {
        entry["name"]: entry for entry in map(json.loads, (scores / "scores.jsonl").read_text().splitlines())
    }
    assert found["teacher"]["teacher_kl_web"] == pytest.approx(0, abs=1e-4)
    assert found["s63"]["teacher_kl_web"] > 0.01
    assert found["packed"]["teacher_kl_web"] == pytest.approx(found["s63"]["teacher_kl_web"], rel=0.02)
    assert found["w4a8"]["teacher_kl_web"] > 0
    assert found["packed"]["reference_kl_web"] == pytest.approx(0, abs=1e-4)
    assert not any(key.startswith("reference") for key in found["s63"])
    text, first, both = (found["s63"]["spikes"][key] for key in ("text", "first", "both"))
    assert first["tokens"] == 6 * 2 + 5  # a row for each choice, and for each continuation
    assert both["tokens"] == text["tokens"] + first["tokens"]
    assert 0.2 < text["nonzero"] < 0.6
    assert len(found["s63"]["projections"]) == 8
    assert found["s63"]["gap"]["low"] <= found["s63"]["gap"]["gap"] <= found["s63"]["gap"]["high"]


def test_the_shipped_student_is_the_one_that_was_scored(convert, monkeypatch):
    """Its index is of the run, its files are those of the index, and its card says what they scored."""
    monkeypatch.chdir(ROOT)
    settings = convert.student_card.parse_settings(
        convert.student_card.StudentCardSettings, ["recipes/convert/student_card.yaml"]
    )
    folder = Path(settings.model)
    (entry,) = [each for each in read_records(Path(settings.records)) if each["name"] == settings.name]
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == convert.student_card.head(entry, folder.name).to_dict()
    for task, found in entry["tasks"].items():
        assert f"| {task} | {BENCHMARK_SETS[task].main} | {found['items']:,} |" in card.text
    index = json.loads((folder / "mixers.json").read_text())
    files = [*index["files"], index["student"]]
    assert index["sha256"] == {name: file_sha256(folder / name) for name in files}
    log = Path(settings.records).with_name(f"{settings.name.removesuffix('-packed')}-training.jsonl")
    last = list(read_records(log))[-1]
    assert [last[key] for key in ("step", "tokens")] == [index["progress"][key] for key in ("step", "tokens")]
    assert f"{last['tokens'] / 1e6:.1f} million tokens in {last['seconds']:.0f} seconds on two" in card.text
    recipe = yaml.safe_load(Path("recipes/distill/smollm2-63.yaml").read_text())
    apart = ("own_text", "package_text", "levels_in")  # the last is no setting
    asked = {key: value for key, value in index["progress"]["settings"].items() if key not in apart}
    assert asked == {key: recipe[key] for key in asked}
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert max(sizes) <= 16e6
    assert sum(sizes) <= 64e6
    assert f"({sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e6:.0f} MB)" in card.text


def test_own_text_and_passages_as_text(convert, folder, tmp_path, monkeypatch, capsys):
    """What stands between ends of text, and rows of passages, by a tokenizer whose tokens are words."""

    class Words:
        def batch_decode(self, rows):
            return [" ".join(map(str, row)) for row in rows]

    np.array([0, 5, 6, 0, 0, 7, 0], dtype=np.uint16).tofile(tmp_path / "own-0.bin")
    np.array([8, 9], dtype=np.uint16).tofile(tmp_path / "own-1.bin")
    monkeypatch.setattr(convert.decode_text, "load_source_tokenizer", lambda name: Words())
    own = f"own_text=[{tmp_path}/own-0.bin,{tmp_path}/own-1.bin]"
    given = [str(FOLDER / "decode_text.yaml"), "source=any", own]
    given += [f"data={folder / 'data'}", f"output={tmp_path / 'text'}"]
    monkeypatch.setattr("sys.argv", ["decode_text.py", *given])
    convert.decode_text.main()
    own = list(read_records(tmp_path / "text" / "train.jsonl"))
    assert own == [{"text": text, "source": "own"} for text in ("5 6", "7", "8 9")]
    kept = np.load(folder / "data" / "evaluated.npz")
    rows = list(read_records(tmp_path / "text" / "held_out.jsonl"))
    for name in ("openwebtext", "wikipedia"):
        tokens = kept[f"{name}-passages"]
        texts = [row["text"] for row in rows if row["source"] == name]
        assert texts == [
            " ".join(map(str, tokens[k * 511 : k * 511 + 511])) for k in range(len(tokens) // 511)
        ]
    assert "3 documents, 5 tokens" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["decode_text.py", *given, "documents=2"])
    convert.decode_text.main()
    assert [row["text"] for row in read_records(tmp_path / "text" / "train.jsonl")] == ["5 6", "7"]
    assert list(read_records(tmp_path / "text" / "held_out.jsonl")) == rows


def test_what_hardly_changes_weights_hardly_moves_a_dense_model(convert, folder, tmp_path):
    """Against logits worked out here; the noise is of the size asked for, and nothing else is changed."""
    dense = load_dense(folder / "dense")
    ids = convert.perturb.passages(str(folder / "data" / "evaluated.npz"), 1)
    kept = np.load(folder / "data" / "evaluated.npz")
    assert ids[:, 0].tolist() == [0, 0]
    assert ids[1, 1:].tolist() == kept["wikipedia-passages"][:511].tolist()
    changed = convert.perturb.perturbed(dense, 1e-3, 0)
    ratios = []
    for (name, one), two in zip(changed.named_parameters(), dense.parameters(), strict=True):
        if name.endswith("proj.weight"):
            ratios.append((one / two)[two != 0].detach() - 1)
        else:
            assert torch.equal(one, two), name
    assert float(torch.cat([r.flatten() for r in ratios]).std()) == pytest.approx(1e-3, rel=0.05)
    own, moved = (convert.perturb.all_logits(model, ids, "") for model in (dense, changed))
    with torch.no_grad():
        wanted = [model(input_ids=ids, use_cache=False).logits[:, 1:].double() for model in (dense, changed)]
    torch.testing.assert_close(own.double(), wanted[0], rtol=1e-4, atol=1e-4)
    p, q = (logits.log_softmax(-1) for logits in wanted)
    found = convert.perturb.measures(moved, own, own, ids)
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.05, abs=1e-6)
    assert found["kl"] == found["teacher_kl"]
    nats = torch.nn.functional.nll_loss(q[:, :-1].flatten(0, 1), ids[:, 2:].flatten())
    assert found["perplexity"] == pytest.approx(float(nats.exp()), rel=1e-4)
    assert found["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    with pytest.raises(convert.perturb.RunError, match="no 1000 rows"):
        convert.perturb.passages(str(folder / "data" / "evaluated.npz"), 1000)
