"""What a conversion needs besides the Transformer: text, openings to write text from, and what is evaluated.

python recipes/convert/prepare.py recipes/convert/prepare.yaml
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from openings import openings
from pydantic import Field
from tokens import END

from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.files import refuse_file
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.schema import Count, Name, Seed, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.data.benchmarks import BENCHMARK_SETS
from spiking_mamba.data.contamination import EVALUATED, evaluated_texts
from spiking_mamba.data.packages import read_corpus
from spiking_mamba.evaluation.tasks import undisturbed, zero_shot_tasks
from spiking_mamba.model.source import load_source_tokenizer


@schema
class PrepareSettings:
    """Every field is a key of the YAML file.

    Attributes:
        source: the Transformer, whose tokenizer is used, see ``source.load_source``.
        corpus: folder that ``recipes/teacher/corpus.py`` has written.
        output: folder for what is prepared.
        skip: sources of the corpus that are left out.
        openings: how many.
        opening: their most tokens.
        passages: of each kind, for perplexity and KL.
        seed: of the draws.
    """

    source: Name
    corpus: Name
    output: Name
    skip: list[Name]
    openings: Count = 100_000
    opening: Annotated[int, Field(ge=1, le=255)] = 48
    passages: Count = 200
    seed: Seed = 0


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids without special tokens."""
    return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []


def requests(tokenizer: Any) -> Iterator[tuple[str, int, int, int, list[int], int, int]]:
    """(task, item, choice, right choice, tokens, continuation's tokens, its characters) of all tasks.

    A task that asks for a greedy continuation has one choice, which is -1's.
    """
    for name, task in zero_shot_tasks(list(BENCHMARK_SETS)).items():
        with undisturbed():
            task.build_all_requests(rank=0, world_size=1)
        items: dict[int, list[Any]] = {}
        for instance in task.instances:
            items.setdefault(instance.doc_id, []).append(instance)
        for number, instances in items.items():
            instances.sort(key=lambda instance: instance.idx)
            right = _right(task, instances)
            sizes = [len(c) for c in task.doc_to_choice(instances[0].doc)] if right >= 0 else [1]
            for choice, instance in enumerate(instances):
                context, continuation = instance.args[:2]
                spaces = len(context) - len(context.rstrip())  # as lm-eval, to the continuation
                if spaces:
                    context, continuation = context[:-spaces], context[-spaces:] + continuation
                whole, start = encode(tokenizer, [context + continuation, context])
                size = sizes[choice] if choice < len(sizes) else sizes[-1]
                yield name, number, choice, right, whole, len(whole) - len(start), size


def _right(task: Any, instances: list[Any]) -> int:
    """The choice for which the task counts an item as right: asked, not read out of the item."""
    if len(instances) == 1:
        return -1
    for choice in range(len(instances)):
        results = [(0.0 if choice == k else -1e9, False) for k in range(len(instances))]
        if task.process_results(instances[0].doc, results)["acc"] == 1.0:
            return choice
    raise RunError("An item has no right choice.")


def write_evaluated(tokenizer: Any, settings: PrepareSettings, folder: Path) -> dict[str, int]:
    """``evaluated.npz``: requests of the tasks, passages, and all evaluated texts for the filter."""
    rows = list(requests(tokenizer))
    names = list(dict.fromkeys(row[0] for row in rows))
    table = np.array([[names.index(r[0]), *r[1:4], len(r[4]), r[5], r[6]] for r in rows], dtype=np.int32)
    arrays = {"names": np.array(names), "requests": table}
    arrays["tokens"] = np.array([t for r in rows for t in r[4]], dtype=np.uint16)
    for name in EVALUATED:
        documents = encode(tokenizer, read_corpus(name)[: settings.passages])
        arrays[name] = np.array([t for d in documents for t in (END, *d)], dtype=np.uint16)
    texts = encode(tokenizer, list(dict.fromkeys(text for _, text in evaluated_texts())))
    arrays["texts"] = np.array([t for d in texts for t in (*d, END)], dtype=np.uint16)
    np.savez_compressed(folder / "evaluated.npz", **arrays)
    return {name: sum(row[0] == name for row in rows) for name in names} | {"texts": len(arrays["texts"])}


def write_text(tokenizer: Any, settings: PrepareSettings, folder: Path) -> tuple[dict[str, int], list[str]]:
    """``package_text.bin`` and the documents it is of."""
    documents, counts, tokens = [], {}, []
    for line in Path(settings.corpus, "train.jsonl").read_text().splitlines():
        document = json.loads(line)
        if document["source"] not in settings.skip:
            documents.append(document)
    for start in range(0, len(documents), 1000):
        part = documents[start : start + 1000]
        for document, ids in zip(part, encode(tokenizer, [d["text"] for d in part]), strict=True):
            counts[document["source"]] = counts.get(document["source"], 0) + len(ids) + 1
            tokens.append(np.array([*ids, END], dtype=np.uint16))
    np.concatenate(tokens).tofile(folder / "package_text.bin")
    return counts, [document["text"] for document in documents]


@fail_clearly()
def main() -> None:
    settings = parse_settings(PrepareSettings, description=__doc__)
    quiet()
    folder = Path(settings.output)
    refuse_file(folder)
    tokenizer = load_source_tokenizer(settings.source)
    if len(tokenizer) > 2**16:
        raise RunError(f"{settings.source} has {len(tokenizer)} tokens; files of tokens hold 65,536.")
    if not (text := Path(settings.corpus, "train.jsonl")).is_file():
        raise RunError(f"There is no {text}: recipes/teacher/corpus.py writes it.")
    folder.mkdir(parents=True, exist_ok=True)
    counts, texts = write_text(tokenizer, settings, folder)
    ids, kinds = openings(tokenizer, texts, settings.openings, settings.opening, settings.seed)
    lengths = np.array([len(opening) for opening in ids], dtype=np.uint8)
    flat = np.array([token for opening in ids for token in opening], dtype=np.uint16)
    np.savez_compressed(folder / "openings.npz", tokens=flat, lengths=lengths)
    evaluated = write_evaluated(tokenizer, settings, folder)
    manifest = {"settings": asdict(settings), "tokens": counts, "openings": kinds, "evaluated": evaluated}
    (folder / "prepared.json").write_text(json.dumps(manifest, indent=1))
    print(json.dumps(manifest, indent=1))


if __name__ == "__main__":
    main()
