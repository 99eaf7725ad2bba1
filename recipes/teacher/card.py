"""Write a teacher's model card from what its corpus, training and evaluation left behind.

python recipes/teacher/card.py recipes/teacher/card.yaml

The card's text stands in card.md; recipes/teacher/README.md says what has to be run before. No number is
typed in either: each comes from a record or from the weights themselves.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from datasets import Dataset
from huggingface_hub import ModelCardData
from pydantic import Field

from spiking_mamba import data
from spiking_mamba.common.errors import DataError, fail_clearly
from spiking_mamba.common.files import write_whole
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.records import read_records
from spiking_mamba.common.schema import Count, Name, Names, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.evaluation.measuring import weights_sha256
from spiking_mamba.evaluation.scoring import perplexity
from spiking_mamba.evaluation.statistics import interval
from spiking_mamba.evaluation.tasks import zero_shot_tasks
from spiking_mamba.model.checkpoint import load_dense
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.reports.document import markdown_table
from spiking_mamba.reports.figures import picture
from spiking_mamba.reports.hub_card import card_data, hub_card, scores_of

TEMPLATE = Path(__file__).with_name("card.md")
TOP_P, TEMPERATURE, NEW_TOKENS = 0.95, 0.8, 60  # of the samples
CURVE = "curve.png"


@schema
class CardSettings:
    """Keys of the YAML file.

    Attributes:
        model: folder of the model; the card goes there.
        run: folder of its training, for the log; null: the card has no losses, and the curve that is there.
        corpus: folder with ``manifest.json`` and ``ngram.json`` of its corpus.
        evaluation: ``results.json`` of ``recipes/evaluate`` for that model, or several of them; of what two
            have, the later one counts.
        lambada: JSON file of the perplexity on LAMBADA's passages; computed and written if it is not there.
        further: runs of ``recipes/ablate/study.py`` in which the model was trained further, dense, each
            ``FILE.jsonl#ROW#SEED``.
        samples: how many.
    """

    model: Name
    corpus: Name
    evaluation: Annotated[Names, Field(min_length=1)]
    lambada: Name
    run: Name | None = None
    further: list[Name] = field(default_factory=list)
    samples: Count = 10


# Records ------------------------------------------------------------------------------------------------


def read_run(name: str) -> dict[str, Any]:
    """One run of a table, ``FILE.jsonl#ROW#SEED``."""
    path, _, rest = name.partition("#")
    row, _, seed = rest.rpartition("#")
    for record in read_records(Path(path)):
        if (record.get("row"), str(record.get("seed"))) == (row, seed):
            return record
    raise DataError(f"There is no run {name}: FILE.jsonl#ROW#SEED is wanted.")


def read(path: str | Path) -> Any:
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no {path}: see recipes/teacher/README.md.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from error


@dataclass
class Records:
    """What was written down of one teacher, all of the same weights and the same corpus."""

    training: dict[str, Any]
    manifest: dict[str, Any]
    ngram: dict[str, Any]
    evaluations: list[dict[str, Any]]
    further: list[dict[str, Any]]
    log: list[dict[str, float]] | None
    weights: str

    @classmethod
    def of(cls, settings: CardSettings) -> "Records":
        folder, corpus = Path(settings.model), Path(settings.corpus)
        records = cls(
            training=read(folder / "training.json"),
            manifest=read(corpus / "manifest.json"),
            ngram=read(corpus / "ngram.json"),
            evaluations=[read(path) for path in settings.evaluation],
            further=[read_run(name) for name in settings.further],
            log=None if settings.run is None else read(Path(settings.run) / "log.json"),
            weights=weights_sha256(folder),
        )
        records.check(settings)
        return records

    @property
    def corpus_sha256(self) -> str:
        (sha256,) = self.training["data_sha256"].values()
        return sha256

    def check(self, settings: CardSettings) -> None:
        """Raise ValueError, which names the record, where one is of something else."""
        if self.manifest["files"]["train.jsonl"]["sha256"] != self.corpus_sha256:
            raise ValueError(f"{settings.corpus} is not the corpus that {settings.model} was trained on.")
        for path, results in zip(settings.evaluation, self.evaluations, strict=True):
            models = results.get("models", ())
            if len(models) != 1 or models[0]["weights_sha256"] != self.weights:
                raise ValueError(
                    f"{path} is no evaluation of {settings.model} alone, as its weights are now."
                )
        for path, run in zip(settings.further, self.further, strict=True):
            depends = run.get("depends", {})
            same = depends.get("teacher", {}).get("model.safetensors") == self.weights
            dense = run.get("status") == "done" and run["settings"]["neuron"] is None
            if not (same and dense and depends.get("data") == self.corpus_sha256):
                raise ValueError(f"{path} is no finished run that trains {settings.model} further, dense.")

    def evaluated(self, kind: str) -> dict[str, Any]:
        """All ``tasks``, or all texts of ``perplexity``, that were evaluated."""
        return {name: result for each in self.evaluations for name, result in each["models"][0][kind].items()}


def lambada(model: Any, tokenizer: Any, weights: str, length: int, path: Path) -> dict[str, Any]:
    """Perplexity and bits per byte of LAMBADA's passages, in float32.

    Kept in ``path`` with the weights' sha256.
    """
    about = {"weights_sha256": weights, "length": length}
    if path.is_file():
        found = read(path)
        if {key: found.get(key) for key in about} != about:
            raise ValueError(f"{path} is of other weights or rows: delete it to have it computed again.")
        return found
    documents = zero_shot_tasks(["lambada_openai"])["lambada_openai"].eval_docs
    texts = Dataset.from_dict({"text": [document["text"] for document in documents]})
    rows = data.tokenize(texts, tokenizer, length)
    found = perplexity(model, rows, bytes=data.count_bytes(rows, tokenizer))
    write_whole(path, json.dumps(about | found, indent=1) + "\n")
    return about | found


# Parts of the card --------------------------------------------------------------------------------------


def text_label(name: str) -> str:
    return "held-out documents" if name.endswith("held_out.jsonl") else name


def perplexity_table(texts: dict[str, Any], ngram: dict[str, Any]) -> str:
    rows = []
    for name, of_text in texts.items():
        baseline = ngram.get(name, {}).get("bits_per_byte")
        beaten = ["-", "-"]
        if baseline is not None:
            beaten = [f"{baseline:.3f}", f"{1 - of_text['bits_per_byte'] / baseline:.1%}"]
        label = text_label(name)
        rows.append([label, f"{of_text['perplexity']:.2f}", f"{of_text['bits_per_byte']:.3f}", *beaten])
    header = ["text", "perplexity", "bits per byte", f"{ngram['order']}-gram", "fewer bits by"]
    return markdown_table(header, rows)


def score_table(tasks: dict[str, Any]) -> str:
    rows = []
    for name, task in tasks.items():
        cells = [
            f"{m['value']:.3f}" + (f" ± {m['stderr']:.3f}" if m["stderr"] is not None else "") if m else ""
            for m in (task["metrics"].get(key) for key in ("acc", "acc_norm"))
        ]
        rows.append([name, str(task["n"]), *cells, f"{task['chance']:.3f}" if task["chance"] else "-"])
    return markdown_table(["set", "items", "acc", "acc_norm", "chance"], rows)


def source_table(manifest: dict[str, Any]) -> str:
    rows = [
        [f"{of['package']} {of['version']}", of["licence"], str(of["documents"]), f"{of['tokens']:,}"]
        for of in manifest["sources"].values()
    ]
    return markdown_table(["package", "licence", "documents", "tokens"], rows)


def further_text(runs: Sequence[dict[str, Any]], corpus_tokens: int) -> str:
    """What further training on the same corpus did to the perplexity of held-out documents."""
    if not runs:
        return ""
    rows = [["0", "0", "-", "-", f"{runs[0]['before']['perplexity']:.2f}"]]
    kinds: dict[tuple[int, float], list[float]] = {}
    for run in runs:
        kind = (run["tokens"], run["settings"]["training"]["learning_rate"])
        kinds.setdefault(kind, []).append(run["after"]["perplexity"])
    for (tokens, rate), losses in sorted(kinds.items()):
        passes, millions = f"{tokens / corpus_tokens:.1f}", f"{tokens / 1e6:.1f}"
        rows.append([passes, millions, f"{rate:g}", str(len(losses)), f"{interval(losses)['mean']:.2f}"])
    header = ["further passes", "million tokens", "learning rate at most", "seeds", "perplexity"]
    length = runs[0]["settings"]["length"]
    return (
        f"\nTrained further on the same corpus, held-out documents in rows of {length} tokens (dense "
        f"controls of\n[the study](../../../docs/results.md)):\n\n{markdown_table(header, rows)}\n"
    )


def losses_text(log: Sequence[dict[str, float]] | None, tokens_a_step: float) -> str:
    """The last losses, and the held-out one a fifth of the way before."""
    if log is None:
        return ""
    held, seen = ([row for row in log if key in row] for key in ("eval_loss", "loss"))
    if not held or not seen:
        raise ValueError("The log has no loss, or none on held-out documents: set held_out when training.")
    last = held[-1]
    earlier = min(held, key=lambda row: abs(row["step"] - 0.8 * last["step"]))
    rest = (last["step"] - earlier["step"]) * tokens_a_step / 1e6
    return (
        f"\nAt the end the loss is {seen[-1]['loss']:.3f} nats a token on the corpus and "
        f"{last['eval_loss']:.3f} on held-out documents; {rest:.0f} million\ntokens before, "
        f"{earlier['eval_loss']:.3f}.\n"
    )


def draw(log: Sequence[dict[str, float]], tokens_a_step: float, path: Path) -> None:
    """The losses by tokens, from where held-out documents were first asked on."""
    with picture(path, 7.5, 4, dpi=110) as (_, axis):
        losses = {}
        for key, label in (("loss", "corpus"), ("eval_loss", "held-out documents")):
            points = [(row["step"] * tokens_a_step / 1e6, row[key]) for row in log if key in row]
            axis.plot(*zip(*points, strict=True), label=label, marker="." if key == "eval_loss" else None)
            losses[key] = [loss for _, loss in points]
        low, high = min(map(min, losses.values())), losses["eval_loss"][0]
        space = 0.1 * (max(high, low + 0.1) - low)
        axis.set(xlabel="million tokens", ylabel="nats a token", ylim=(low - space, high + 3 * space))
        axis.grid(color="#e5e5e5")
        axis.legend()


def sample(model: Any, tokenizer: Any, seed: int) -> str:
    torch.manual_seed(seed)
    start = torch.tensor([[tokenizer.eos_token_id]])
    ids = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=NEW_TOKENS, do_sample=True, top_p=TOP_P,
        temperature=TEMPERATURE,
    )  # fmt: skip
    text = " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())
    return "> " + re.sub(r"([*_<>`\[\]#])", r"\\\1", text)


def held_out_text(manifest: dict[str, Any]) -> str:
    if manifest.get("drawn_by") == "document":
        return "Corpus documents are held out whole."
    return (
        "What is held out of the corpus are\nsections: of a document of several, a speech or a long chapter, "
        "others may be in training, which flatters the first row."
    )


def items_text(tasks: dict[str, Any]) -> str:
    """Which items were asked."""
    fewer = {name: task for name, task in tasks.items() if task["n"] < task["data"]["rows"]}
    if not fewer:
        return "of all items of each set."
    drawn = {name: task["drawn"]["seed"] for name, task in fewer.items() if task.get("drawn")}
    seed = ", ".join(map(str, sorted(set(drawn.values()))))
    if len(drawn) == len(fewer):
        return (
            "of items drawn from each\nset where there are more "
            f"(`limit_seed={seed}`), of each source its share."
        )
    text = "of the first items of each set where there are more"
    if drawn:
        text += f";\nthose of {', '.join(drawn)} are drawn (`limit_seed={seed}`), of each source its share"
    text += "."
    if "hellaswag" in fewer.keys() - drawn:
        text += (
            "\nHellaSwag's first ones are all ActivityNet's and no sample of the set: "
            "its two numbers say nothing of it."
        )
    return text


# The card -----------------------------------------------------------------------------------------------


def training_fields(training: dict[str, Any]) -> dict[str, Any]:
    steps = training["settings"]["training"].get("max_steps")
    if not steps:
        raise ValueError("The card tells how many steps a training took: it must be one with max_steps.")
    return {
        "millions": training["parameters"] / 1e6,
        "saved": training["settings"]["save_dtype"],
        "command": training["command"],
        "processes": training["gpus_or_processes"],
        "hardware": training["hardware"]["gpu"] or training["hardware"]["cpu"],
        "seed": training["settings"]["seed"],
        "torch": training["versions"]["torch"],
        "date": training["date"][:10],
        "seen": training["tokens_seen"] / 1e6,
        "epochs": training["epochs"],
        "corpus": training["corpus_tokens"] / 1e6,
        "steps": steps,
        "step_tokens": round(training["tokens_seen"] / steps),
    }


def evaluation_fields(records: Records, on_lambada: dict[str, Any]) -> dict[str, Any]:
    provenance = records.evaluations[0]["provenance"]
    texts = records.evaluated("perplexity") | {"LAMBADA": on_lambada}
    return {
        "perplexities": perplexity_table(texts, records.ngram),
        "scores": score_table(records.evaluated("tasks")),
        "length": provenance["settings"]["length"],
        "dtype": records.evaluations[0]["models"][0]["dtype"],
        "evaluated": f"{provenance['date'][:10]} on {provenance['hardware']['cpu']}",
        "commands": "\n".join(f"    {each['provenance']['command']}" for each in records.evaluations),
        "order": records.ngram["order"],
        "overlap": records.manifest["settings"]["overlap"],
        "held_out": held_out_text(records.manifest),
        "items": items_text(records.evaluated("tasks")),
    }


def write(settings: CardSettings) -> Path:
    """Write the card, and the curve if there is a log; return the card's path."""
    folder, records = Path(settings.model), Records.of(settings)
    model, tokenizer = load_dense(folder), load_tokenizer(folder)
    length = records.evaluations[0]["provenance"]["settings"]["length"]
    on_lambada = lambada(model, tokenizer, records.weights, length, Path(settings.lambada))
    fields = training_fields(records.training) | evaluation_fields(records, on_lambada)
    tokens_a_step = records.training["tokens_seen"] / fields["steps"]
    losses = losses_text(records.log, tokens_a_step)
    if records.log is not None:
        draw(records.log, tokens_a_step, folder / CURVE)
    curve = f"\n![Cross-entropy by training tokens]({CURVE})\n" if (folder / CURVE).is_file() else ""
    card = TEMPLATE.read_text().format(
        **fields,
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        state=model.config.state_size,
        vocabulary=model.config.vocab_size,
        curve=curve,
        losses=losses,
        further=further_text(records.further, records.training["corpus_tokens"]),
        data=source_table(records.manifest),
        count=settings.samples,
        last=settings.samples - 1,
        new=NEW_TOKENS,
        top_p=TOP_P,
        temperature=TEMPERATURE,
        samples="\n\n".join(sample(model, tokenizer, seed) for seed in range(settings.samples)),
    )
    write_whole(folder / "README.md", str(hub_card(head(records, on_lambada), card)))
    return folder / "README.md"


def head(records: Records, on_lambada: dict[str, Any]) -> ModelCardData:
    """What the hub reads; the corpus has no name there."""
    texts = {text_label(name): of_text for name, of_text in records.evaluated("perplexity").items()}
    scores = scores_of(records.evaluated("tasks"), texts | {"LAMBADA": on_lambada})
    name = records.evaluations[0]["models"][0]["name"]
    return card_data(name, scores, "apache-2.0", spiking=False)


@fail_clearly()
def main() -> None:
    settings = parse_settings(CardSettings, description=__doc__)
    quiet()
    print(f"The card is {write(settings)}.")


if __name__ == "__main__":
    main()
