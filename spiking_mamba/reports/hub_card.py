"""A model card as the hub reads it: metadata from recorded results, then the card's text."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

__all__ = ["hub_card", "metadata", "write_hub_card"]

TAGS = ("mamba2", "spiking-neural-network", "spikingjelly")
_NORMAL = 1.96  # standard errors to each side of 95%


def _interval(value: float, error: float | None) -> str:
    if error is None or not math.isfinite(error):
        return ""
    return f", 95% interval {value - _NORMAL * error:.3f} to {value + _NORMAL * error:.3f}"


def _evaluated(entry: Mapping[str, Any]) -> list[EvalResult]:
    """The metrics of one model of ``results.json``: each task's main metric, and perplexities."""
    found = []
    for task, scores in entry["tasks"].items():
        score = scores["metrics"][scores["main"]]
        bounds = _interval(score["value"], score["stderr"])
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=task,
                dataset_name=task,
                dataset_split=scores["data"]["split"],
                metric_type=scores["main"],
                metric_name=f"{scores['main']}{bounds}, {scores['n']} items",
                metric_value=score["value"],
            )
        )
    for text, scores in entry["perplexity"].items():
        if scores["perplexity"] is None:
            continue  # beyond what a number holds
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=text,
                dataset_name=text,
                metric_type="perplexity",
                metric_name=f"perplexity, {scores['tokens']} tokens",
                metric_value=scores["perplexity"],
            )
        )
    return found


def metadata(
    results: Mapping[str, Any],
    model: str,
    licence: str,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
) -> ModelCardData:
    """What stands at the head of a card.

    Args:
        results: ``results.json`` of an evaluation.
        model: the name of a model in it.
        licence: as the hub writes it, ``apache-2.0``.
        base_model: hub name of what it was made of.
        datasets: hub names of what it was trained on.

    Raises:
        ValueError: the results know no such model.
    """
    entry = next((entry for entry in results["models"] if entry["name"] == model), None)
    if entry is None:
        known = ", ".join(entry["name"] for entry in results["models"])
        raise ValueError(f"The results know no model {model!r}, only {known}.")
    evaluated = _evaluated(entry)
    return ModelCardData(
        language="en",
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_model,
        datasets=list(datasets) or None,
        metrics=sorted({each.metric_type for each in evaluated}) or None,
        tags=list(TAGS if entry["neuron"] is not None else TAGS[:1]),
        model_name=model,
        eval_results=evaluated or None,
    )


def hub_card(data: ModelCardData, text: str) -> ModelCard:
    """A card of this text; metadata that it had is replaced."""
    card = ModelCard(text)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{card.text}")


def write_hub_card(folder: str | Path, data: ModelCardData) -> None:
    """Put metadata at the head of a folder's ``README.md``, made of its name where there is none."""
    path = Path(folder) / "README.md"
    text = path.read_text() if path.is_file() else f"# {data.model_name}\n"
    hub_card(data, text).save(path)
