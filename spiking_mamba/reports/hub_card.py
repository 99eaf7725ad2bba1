"""A model card as the hub reads it: metadata from recorded results, then the card's text."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

__all__ = ["Score", "accuracy", "card_data", "hub_card", "metadata", "scores_of", "write_hub_card"]

TAGS = ("mamba2", "spiking-neural-network", "spikingjelly")
_NORMAL = 1.96  # standard errors to each side of 95%


class Score(NamedTuple):
    """A number that was measured.

    Attributes:
        dataset: what on, a task or a text.
        metric: as the hub calls it, ``acc``, ``perplexity``.
        value: of it.
        of: so many, such as "250 items".
        interval: ends of the 95% interval; None: it is not known.
        split: of the dataset.
    """

    dataset: str
    metric: str
    value: float
    of: str
    interval: tuple[float, float] | None = None
    split: str | None = None

    def result(self) -> EvalResult:
        """As the hub has it; it knows no intervals, so that they stand in the metric's name."""
        digits = 3 if abs(self.value) <= 1 else 2
        bounds = ""
        if self.interval is not None:
            bounds = ", 95% interval {:.{digits}f} to {:.{digits}f}".format(*self.interval, digits=digits)
        return EvalResult(
            task_type="text-generation",
            dataset_type=self.dataset,
            dataset_name=self.dataset,
            dataset_split=self.split,
            metric_type=self.metric,
            metric_name=f"{self.metric}{bounds}, {self.of}",
            metric_value=round(self.value, 4),
        )


def accuracy(
    task: str, metric: str, value: float, error: float | None, count: str, split: str | None = None
) -> Score:
    """A score with the interval that its standard error gives, where there is one."""
    known = error is not None and math.isfinite(error)
    ends = (value - _NORMAL * error, value + _NORMAL * error) if known and error is not None else None
    return Score(task, metric, value, count, ends, split)


def scores_of(tasks: Mapping[str, Any], texts: Mapping[str, Any]) -> list[Score]:
    """Of a model of ``results.json``: the main metric of each of its ``tasks``, and perplexities."""
    found = []
    for task, scores in tasks.items():
        score, of = scores["metrics"][scores["main"]], scores["data"]
        count = f"{scores['n']} items" + (f" of {of['rows']}" if of["rows"] > scores["n"] else "")
        found.append(accuracy(task, scores["main"], score["value"], score["stderr"], count, of["split"]))
    for text, scores in texts.items():
        if scores["perplexity"] is not None:  # beyond what a number holds
            found.append(Score(text, "perplexity", scores["perplexity"], f"{scores['tokens']} tokens"))
    return found


def card_data(
    model: str,
    scores: Iterable[Score],
    licence: str,
    *,
    spiking: bool,
    library: str = "transformers",
    base_model: str | None = None,
    datasets: Sequence[str] = (),
) -> ModelCardData:
    """What stands at the head of a card.

    Args:
        model: its name.
        scores: what was measured.
        licence: as the hub writes it, ``apache-2.0``.
        spiking: whether it has neurons.
        library: that loads it.
        base_model: hub name of what it was made of.
        datasets: hub names of what it was trained on.
    """
    evaluated = [score.result() for score in scores]
    return ModelCardData(
        language="en",
        license=licence,
        library_name=library,
        pipeline_tag="text-generation",
        base_model=base_model,
        datasets=list(datasets) or None,
        metrics=sorted({each.metric_type for each in evaluated}) or None,
        tags=list(TAGS if spiking else TAGS[:1]),
        model_name=model,
        eval_results=evaluated or None,
    )


def metadata(
    results: Mapping[str, Any],
    model: str,
    licence: str,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
) -> ModelCardData:
    """What stands at the head of the card of an evaluated model.

    Args:
        results: ``results.json`` of an evaluation.
        model: the name of a model in it.
        licence, base_model, datasets: see :func:`card_data`.

    Raises:
        ValueError: the results know no such model.
    """
    entry = next((entry for entry in results["models"] if entry["name"] == model), None)
    if entry is None:
        known = ", ".join(entry["name"] for entry in results["models"])
        raise ValueError(f"The results know no model {model!r}, only {known}.")
    scores, spiking = scores_of(entry["tasks"], entry["perplexity"]), entry["neuron"] is not None
    return card_data(model, scores, licence, spiking=spiking, base_model=base_model, datasets=datasets)


def hub_card(data: ModelCardData, text: str) -> ModelCard:
    """A card of this text; metadata that it had is replaced."""
    if text.startswith("---\n"):
        text = ModelCard(text).text
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def write_hub_card(folder: str | Path, data: ModelCardData) -> None:
    """Put metadata at the head of a folder's ``README.md``, made of its name where there is none."""
    path = Path(folder) / "README.md"
    text = path.read_text() if path.is_file() else f"# {data.model_name}\n"
    hub_card(data, text).save(path)
