"""Write a teacher's model card from what its corpus, training and evaluation left behind.

python recipes/teacher/card.py recipes/teacher/card.yaml

The card's text stands in card.md; recipes/teacher/README.md says what has to be run before.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from spiking_mamba import data
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.files import write_whole
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.evaluation.scoring import perplexity
from spiking_mamba.evaluation.tasks import zero_shot_tasks
from spiking_mamba.model.checkpoint import load_dense
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.reports.document import markdown_table
from spiking_mamba.reports.figures import picture

TEMPLATE = Path(__file__).with_name("card.md")
NEW_TOKENS = 60


@dataclass
class CardSettings:
    """Keys of the YAML file.

    Attributes:
        model: folder of the model; the card goes there.
        run: folder of its training, for the log.
        corpus: folder of its corpus, with ``ngram.json``.
        evaluation: ``results.json`` of ``recipes/evaluate`` for that model, or several of them.
        samples: how many.
        notes: a paragraph for the end of "How it was made", Markdown.
    """

    model: str
    run: str
    corpus: str
    evaluation: Any
    samples: int = 10
    notes: str = ""


def read(path: Path) -> Any:
    if not path.is_file():
        raise data.DataError(f"There is no {path}: see recipes/teacher/README.md.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise data.DataError(f"{path} is damaged: {error}") from error


def sample(model: Any, tokenizer: Any, seed: int) -> str:
    torch.manual_seed(seed)
    start = torch.tensor([[tokenizer.eos_token_id]])
    ids = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=NEW_TOKENS, do_sample=True, top_p=0.95,
        temperature=0.8,
    )  # fmt: skip
    text = " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())
    return "> " + re.sub(r"([*_<>`\[\]#])", r"\\\1", text)


def lambada(model: Any, tokenizer: Any, length: int) -> dict[str, float]:
    documents = zero_shot_tasks(["lambada_openai"])["lambada_openai"].eval_docs
    texts = Dataset.from_dict({"text": [document["text"] for document in documents]})
    rows = data.tokenize(texts, tokenizer, length)
    return perplexity(model, rows, bytes=data.count_bytes(rows, tokenizer))


def draw(log: list[dict[str, float]], tokens_a_step: float, path: Path) -> None:
    """The losses by tokens, from where held-out documents were first asked on."""
    with picture(path, 7.5, 4, dpi=110) as (_, axis):
        found = {}
        for key, label in (("loss", "corpus"), ("eval_loss", "held-out documents")):
            points = [(row["step"] * tokens_a_step / 1e6, row[key]) for row in log if key in row]
            axis.plot(*zip(*points, strict=True), label=label, marker="." if key == "eval_loss" else None)
            found[key] = [loss for _, loss in points]
        low, high = min(min(losses) for losses in found.values()), found["eval_loss"][0]
        space = 0.1 * (max(high, low + 0.1) - low)
        axis.set(xlabel="million tokens", ylabel="nats a token", ylim=(low - space, high + 3 * space))
        axis.grid(color="#e5e5e5")
        axis.legend()


def score_rows(tasks: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, task in tasks.items():
        cells = [
            f"{m['value']:.3f}" + (f" ± {m['stderr']:.3f}" if m["stderr"] is not None else "") if m else ""
            for m in (task["metrics"].get(key) for key in ("acc", "acc_norm"))
        ]
        rows.append([name, str(task["n"]), *cells, f"{task['chance']:.3f}" if task["chance"] else "-"])
    return rows


def sources(manifest: dict[str, Any]) -> list[list[str]]:
    return [
        [f"{of['package']} {of['version']}", of["licence"], str(of["documents"]), f"{of['tokens']:,}"]
        for of in manifest["sources"].values()
    ]


@fail_clearly()
def main() -> None:
    settings = parse_settings(CardSettings, description=__doc__)
    quiet()
    folder, corpus = Path(settings.model), Path(settings.corpus)
    training, log = read(folder / "training.json"), read(Path(settings.run) / "log.json")
    manifest, ngram = read(corpus / "manifest.json"), read(corpus / "ngram.json")
    paths = [settings.evaluation] if isinstance(settings.evaluation, str) else settings.evaluation
    every = [read(Path(path)) for path in paths]
    if any(len(each.get("models", ())) != 1 for each in every):
        raise ValueError(f"Each of {', '.join(map(str, paths))} must be an evaluation of one model.")
    results = every[0]
    (found,), *more = [each["models"] for each in every]
    for (other,) in more:
        if other["weights_sha256"] != found["weights_sha256"]:
            raise ValueError("The evaluations are of different weights.")
        found["perplexity"] |= other["perplexity"]
        found["tasks"] |= other["tasks"]
    model, tokenizer = load_dense(folder), load_tokenizer(folder)
    length = results["provenance"]["settings"]["length"]
    texts = found["perplexity"] | {"LAMBADA": lambada(model, tokenizer, length)}
    rows = []
    for name, of_text in texts.items():
        baseline = ngram.get(name, {}).get("bits_per_byte")
        beaten = ["-", "-"]
        if baseline is not None:
            beaten = [f"{baseline:.3f}", f"{1 - of_text['bits_per_byte'] / baseline:.1%}"]
        label = "held-out documents" if name.endswith("held_out.jsonl") else name
        rows.append([label, f"{of_text['perplexity']:.2f}", f"{of_text['bits_per_byte']:.3f}", *beaten])
    held = [row for row in log if "eval_loss" in row]
    steps = held[-1]["step"]
    tokens_a_step = training["tokens_seen"] / steps
    earlier = held[max(0, len(held) - 5)]
    hardware, settings_used = training["hardware"], training["settings"]
    card = TEMPLATE.read_text().format(
        millions=training["parameters"] / 1e6,
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        state=model.config.state_size,
        vocabulary=model.config.vocab_size,
        perplexities=markdown_table(["text", "perplexity", "bits per byte", "5-gram", "fewer bits by"], rows),
        length=length,
        dtype=found["dtype"],
        scores=markdown_table(["set", "items", "acc", "acc_norm", "chance"], score_rows(found["tasks"])),
        evaluated=f"{results['provenance']['date'][:10]} on {results['provenance']['hardware']['cpu']}",
        commands="\n".join(f"    {each['provenance']['command']}" for each in every),
        command=training["command"],
        processes=training["gpus_or_processes"],
        hardware=hardware["gpu"] or hardware["cpu"],
        seed=settings_used["seed"],
        torch=training["versions"]["torch"],
        date=training["date"][:10],
        seen=training["tokens_seen"] / 1e6,
        epochs=training["epochs"],
        corpus=training["corpus_tokens"] / 1e6,
        steps=steps,
        step_tokens=round(tokens_a_step),
        train_loss=[row for row in log if "loss" in row][-1]["loss"],
        held_loss=held[-1]["eval_loss"],
        rest=(steps - earlier["step"]) * tokens_a_step / 1e6,
        before=earlier["eval_loss"],
        notes=f"\n{settings.notes.strip()}\n" if settings.notes.strip() else "",
        data=markdown_table(["package", "licence", "documents", "tokens"], sources(manifest)),
        count=settings.samples,
        last=settings.samples - 1,
        new=NEW_TOKENS,
        samples="\n\n".join(sample(model, tokenizer, seed) for seed in range(settings.samples)),
    )
    draw(log, tokens_a_step, folder / "curve.png")
    write_whole(folder / "README.md", card)
    print(f"The card is {folder / 'README.md'}.")


if __name__ == "__main__":
    main()
