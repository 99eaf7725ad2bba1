"""Write the card of a converted model from the records of its making.

python recipes/convert/model_card.py recipes/convert/model_card.yaml

The card's text stands in model_card.md; its numbers come from the log beside the weights and from the records
of ``write_text.py`` and ``score.py``.
"""

import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from huggingface_hub import ModelCardData
from openings import PARTS
from pydantic import Field

from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.files import file_sha256, write_whole
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.records import read_records
from spiking_mamba.common.schema import Count, Name, Names, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.data.benchmarks import BENCHMARK_SETS
from spiking_mamba.evaluation.outcomes import main_outcomes
from spiking_mamba.evaluation.statistics import kept_share, paired_gap
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.model.converted import mixers_of, read_index
from spiking_mamba.model.source import load_source, load_source_tokenizer
from spiking_mamba.model.tokenizer import chat_prompt
from spiking_mamba.reports.document import markdown_table
from spiking_mamba.reports.figures import picture
from spiking_mamba.reports.hub_card import Score, card_data, hub_card
from spiking_mamba.reports.hub_card import accuracy as accuracy_score

TEMPLATE = Path(__file__).with_name("model_card.md")
CURVE, LOG = "curve.png", "log.jsonl"
TOP_P, TEMPERATURE, NEW_TOKENS = 0.9, 0.7, 60  # of the answers
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # on the hub; the package carries it quantised
ROW = 512  # tokens of held-out text
TEXTS = {"web": "OpenWebText", "wiki": "Wikipedia"}

Items = dict[str, np.ndarray]


@schema
class CardSettings:
    """Keys of the YAML file.

    Attributes:
        model: folder of packed mixers and of their log; the card goes there.
        records: folder with ``scores.jsonl``, ``text.jsonl`` and the items' outcomes.
        source: what it was converted from.
        ability: the sets whose accuracies above chance make up the ability.
        package_tokens: of packages' text, that were trained on.
        questions: that both models answer.
    """

    model: Name
    records: Name
    source: Name
    ability: Annotated[Names, Field(min_length=1)]
    package_tokens: Count
    questions: Annotated[Names, Field(min_length=1)]


class Records:
    """What was written down: scores and items of the source and of the model, texts, and the log."""

    def __init__(self, settings: CardSettings) -> None:
        folder, index = Path(settings.records), read_index(Path(settings.model))
        entries = list(read_records(folder / "scores.jsonl"))
        (self.source,) = [entry for entry in entries if entry["scored"] == "source"]
        (self.model,) = [entry for entry in entries if entry["scored"] != "source"]
        sums = self.model["scored"].get("sha256", {}).items()
        same = all(file_sha256(Path(settings.model, name)) == value for name, value in sums)
        if not same or self.model["scored"]["progress"] != index["progress"]:
            raise RunError(f"{folder} holds the scores of other mixers than {settings.model}.")
        self.items = [main_outcomes(folder / entry["items"]) for entry in (self.source, self.model)]
        self.texts = list(read_records(folder / "text.jsonl"))
        self.log = list(read_records(Path(settings.model, LOG)))
        self.bits = index["bits"]
        self.settings = index["progress"]["settings"]
        self.stages = stages_of(self.log)

    def text(self, kind: str) -> int:
        """Tokens of a kind that were counted in writing text."""
        return sum(text["counts"][f"{kind} tokens"] for text in self.texts)

    def gpu_minutes(self) -> float:
        """Of writing and of training; starting and compiling are not in it."""
        training = sum(stage[-1]["seconds"] * stage[-1]["processes"] for stage in self.stages)
        return (sum(text["settings"]["seconds"] for text in self.texts) + training) / 60

    def last_texts(self) -> list[dict[str, Any]]:
        """The records of the text that the last stage read."""
        names = {Path(name).name for name in self.settings["own_text"]}
        texts = []
        for text in self.texts:
            output = Path(text["settings"]["output"])
            if f"{output.stem}-{text['process']}{output.suffix}" in names:
                texts.append(text)
        return texts


def stages_of(log: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The log in stages: one begins where steps start again."""
    stages: list[list[dict[str, Any]]] = []
    for entry in log:
        if not stages or entry["step"] <= stages[-1][-1]["step"]:
            stages.append([])
        stages[-1].append(entry)
    return stages


def points(value: float) -> str:
    return f"{100 * value:.1f}"


def accuracy(items: np.ndarray) -> str:
    """In points, with its standard error."""
    mean = float(items.mean())
    return f"{points(mean)} ± {points(float(np.sqrt(mean * (1 - mean) / len(items))))}"


def score_table(records: Records) -> str:
    rows = []
    for name, ours in records.items[1].items():
        theirs, about = records.items[0][name], BENCHMARK_SETS[name]
        gap = {
            key: round(-100 * value, 1) + 0.0  # no -0.0
            for key, value in paired_gap({name: theirs}, {name: ours}).items()
        }
        chance = "-" if about.chance is None else points(about.chance)
        difference = f"{gap['gap']:+.1f} ({gap['high']:+.1f} to {gap['low']:+.1f})"
        rows.append(
            [name, about.main, f"{len(ours):,}", chance, accuracy(theirs), accuracy(ours), difference]
        )
    header = ["set", "metric", "items", "chance", "SmolLM2", "as Mamba2", "difference, points"]
    return markdown_table(header, rows)


def kept_text(records: Records, sets: list[str], chance: dict[str, float]) -> str:
    """What is kept on some sets, in per cent with its interval."""
    theirs, ours = ({name: side[name] for name in sets} for side in records.items)
    kept = kept_share(theirs, ours, chance)
    return f"{points(kept['share'])}% ({points(kept['low'])} to {points(kept['high'])})"


def ability_fields(records: Records, ability: list[str]) -> dict[str, Any]:
    """What is kept on the sets of the headline, and what on others: nobody need guess why these."""
    chance = {name: BENCHMARK_SETS[name].chance for name in records.items[0]}
    above = {n: float(records.items[0][n].mean()) - c for n, c in chance.items() if c is not None}
    others = [name for name in above if name not in ability]
    levels = {name: value or 0.0 for name, value in chance.items()}
    single = {n: (float(records.items[1][n].mean()) - levels[n]) / above[n] for n in ability}
    weakest = min(single, key=lambda name: single[name])
    below = [name for name in above if above[name] < 0]
    return {
        "ability_sets": listed(ability),
        "ability": kept_text(records, ability, levels),
        "lambada": kept_text(records, ["lambada_openai"], levels),
        "ability_count": len(ability),
        "least": 100 * min(above[name] for name in ability),
        "most": 100 * max(above[name] for name in others),
        "chance_count": len(above),
        "with_chance": kept_text(records, list(above), levels),
        "with_all": kept_text(records, list(chance), levels),
        "weakest": f"{weakest} ({points(single[weakest])}%)",
        "below": f" On {listed(below)} SmolLM2 does worse than guessing." if below else "",
    }


def listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def passage_table(records: Records) -> str:
    rows = [
        [
            label,
            f"{records.source[f'perplexity_{short}']:.2f}",
            f"{records.model[f'perplexity_{short}']:.2f}",
            f"{records.model[f'kl_{short}']:.3f}",
            f"{points(records.model[f'agreement_{short}'])}%",
        ]
        for short, label in TEXTS.items()
    ]
    header = ["held-out text", "perplexity, SmolLM2", "as Mamba2", "KL, nats a token", "same likeliest token"]
    return markdown_table(header, rows)


def stage_table(records: Records) -> str:
    rows = []
    for number, stage in enumerate(records.stages, 1):
        first, last = stage[0], stage[-1]
        losses = {"layers": "relative error of a layer", "logits": "KL, nats a token"}
        rows.append(
            [
                f"{number}: {last['stage']}",
                str(last["processes"]),
                f"{last['tokens'] / 1e6:.0f}",
                f"{last['seconds']:.0f}",
                f"{last['tokens'] / last['seconds']:,.0f}",
                losses[last["stage"]],
                f"{first['loss']:.3f} to {last['loss']:.3f}",
            ]
        )
    header = [
        "stage",
        "GPUs",
        "million tokens",
        "seconds",
        "tokens/s",
        "loss, training rows",
        "first to last",
    ]
    return markdown_table(header, rows)


def draw(records: Records, path: Path) -> None:
    """The losses by tokens: layers on the left, logits on the right."""
    with picture(path, 8, 3.4, dpi=110, ncols=2) as (_, axes):
        before = {"layers": 0.0, "logits": 0.0}
        for number, stage in enumerate(records.stages, 1):
            kind = stage[0]["stage"]
            axis = axes[int(kind == "logits")]
            at = [before[kind] + entry["tokens"] / 1e6 for entry in stage]
            axis.plot(at, [entry["loss"] for entry in stage], color="#1f5fa8")
            axis.annotate(
                f"stage {number}", (at[0], stage[0]["loss"]), xytext=(6, 0), textcoords="offset points"
            )
            before[kind] = at[-1]
        for axis, title in zip(
            axes, ("relative error of a layer", "KL to SmolLM2, nats a token"), strict=True
        ):
            axis.set(title=title, xlabel="million tokens")
            axis.set_yscale("log")
            axis.grid(color="#e5e5e5", which="both")


def answer(model: Any, tokenizer: Any, question: str, seed: int) -> str:
    """What a model answers in a chat of one question, in one line."""
    asked = chat_prompt(tokenizer, question)
    torch.manual_seed(seed)
    ids = model.generate(
        **asked, max_new_tokens=NEW_TOKENS, do_sample=True, top_p=TOP_P, top_k=0, temperature=TEMPERATURE
    )
    said = ids[0, asked["input_ids"].shape[1] :]
    cut = "" if len(said) < NEW_TOKENS else " ..."
    text = " ".join(tokenizer.decode(said, skip_special_tokens=True).split()) + cut
    return re.sub(r"([*_<>`\[\]#|])", r"\\\1", text)


def samples_text(settings: CardSettings, source: Any, model: Any) -> str:
    tokenizer, parts = load_source_tokenizer(settings.source), []
    for seed, question in enumerate(settings.questions):
        theirs, ours = (answer(side, tokenizer, question, seed) for side in (source, model))
        parts.append(f"**{question}**\n\n> as Mamba2: {ours}\n>\n> SmolLM2: {theirs}")
    return "\n\n".join(parts)


def text_fields(records: Records, package: int) -> dict[str, Any]:
    about = records.texts[0]["settings"]
    seen = records.text("seen")
    shares = PARTS["shares"]
    rows, last = records.settings["rows"], records.last_texts()
    own = sum(text["counts"]["kept tokens"] for text in last)
    own_rows = round(rows * records.settings["own_share"])
    read = records.log[-1]["tokens"] / rows
    return {
        "own_last": own / 1e6,
        "own_passes": read * own_rows / own,
        "package_passes": read * (rows - own_rows) / package,
        "passage_share": 100 * shares["passage"],
        "plain_share": 100 * shares["plain"],
        "chat_share": 100 * shares["chat"],
        "own": records.text("kept") / 1e6,
        "seen": seen / 1e6,
        "looping": 100 * records.text("looping") / seen,
        "evaluated": 100 * records.text("evaluated") / seen,
        "temperature": about["temperature"],
        "min_p": about["min_p"],
        "overlap": about["overlap"],
    }


def evaluation_fields(records: Records) -> dict[str, Any]:
    count = [records.model[f"passages_{short}"] for short in TEXTS]
    return {
        "scores": score_table(records),
        "passages": passage_table(records),
        "passage_count": " and ".join(map(str, count)),
        "passages_asked": max(count),
        "passage_length": ROW,
        "notes": " ".join(
            f"{name}: {about.note}." for name, about in BENCHMARK_SETS.items() if about.note is not None
        ),
        "precision": "bf16" if origin(records.model)["device"].startswith("NVIDIA") else "float32",
    } | origin(records.model)


def origin(entry: dict[str, Any]) -> dict[str, str]:
    """When, on what and by which code something was scored; older records have no ``provenance``."""
    about = entry.get("provenance")
    if about is None:
        return {key: entry[key] for key in ("date", "device", "commit")}
    machine = about["hardware"]
    return {
        "date": about["date"][:10],
        "device": machine["gpu"] or machine["cpu"],
        "commit": str(about["commit"])[:7],
    }


def head(records: Records, name: str) -> ModelCardData:
    """What the hub reads; the text that was trained on has no name there."""
    scores = []
    for task, items in records.items[1].items():
        mean = float(items.mean())
        error, count = float(np.sqrt(mean * (1 - mean) / len(items))), f"{len(items)} items"
        scores.append(accuracy_score(task, BENCHMARK_SETS[task].main, mean, error, count))
    for short, label in TEXTS.items():
        count = f"{records.model[f'passages_{short}']} rows of {ROW} tokens"
        scores.append(Score(label, "perplexity", records.model[f"perplexity_{short}"], count))
    return card_data(
        name, scores, "apache-2.0", spiking=False, library="spiking-mamba", base_model=BASE_MODEL
    )


def write(settings: CardSettings) -> Path:
    """Write the card and the curve; return the card's path."""
    folder, records = Path(settings.model), Records(settings)
    source, model = load_source(settings.source), load_model(folder)
    mixers = mixers_of(model)
    draw(records, folder / CURVE)
    millions, mixer_millions = (
        sum(parameter.numel() for module in modules for parameter in module.parameters()) / 1e6
        for modules in ([model], mixers)
    )
    source_millions = source.num_parameters() / 1e6
    card = TEMPLATE.read_text().format(
        **text_fields(records, settings.package_tokens),
        **evaluation_fields(records),
        **ability_fields(records, settings.ability),
        millions=millions,
        attention_millions=source_millions - (millions - mixer_millions),
        larger=100 * (millions / source_millions - 1),
        mixers=len(mixers),
        mixer_millions=mixer_millions,
        bits=records.bits,
        megabytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6,
        rounded_from=f"stage {len(records.stages)}",
        gpu_minutes=records.gpu_minutes(),
        stages=stage_table(records),
        curve=f"![Losses by tokens]({CURVE})\n",
        package=settings.package_tokens / 1e6,
        length=records.settings["length"],
        sample_temperature=TEMPERATURE,
        sample_top_p=TOP_P,
        last=len(settings.questions) - 1,
        new=NEW_TOKENS,
        samples=samples_text(settings, source, model),
    )
    write_whole(folder / "README.md", str(hub_card(head(records, folder.name), card)))
    return folder / "README.md"


@fail_clearly()
def main() -> None:
    settings = parse_settings(CardSettings, description=__doc__)
    quiet()
    print(f"The card is {write(settings)}.")


if __name__ == "__main__":
    main()
