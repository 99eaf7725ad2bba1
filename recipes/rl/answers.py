"""How long models' greedy answers to questions of a chat are, and whether they end, in integers.

python recipes/rl/answers.py recipes/rl/answers.yaml
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from spiking_mamba.common.checkpoint_files import locate
from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.machine import check_threads, cores
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.provenance import provenance, refuse_changed_code
from spiking_mamba.common.records import put_record
from spiking_mamba.common.schema import Count, Name, Names, Seed, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.data.preferences import HALVES, half_of, load_preferences
from spiking_mamba.evaluation.statistics import paired_gap
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.model.event_driven import EventDrivenMambaForCausalLM, event_driven
from spiking_mamba.model.tokenizer import chat_prompt, check_vocabulary, load_tokenizer
from spiking_mamba.reports.document import markdown_table


@schema
class AnswersSettings:
    """Every field is a key of the YAML file.

    Attributes:
        models: folders of checkpoints, spiking or dense; differences are from the first.
        data, split, half, half_seed: whose prompts are asked, see ``PreferenceSettings``; half null: of all.
        questions: how many of them, the first.
        tokens: of an answer at most.
        threads: null: as many as this process may use.
        results: file of the records, one a model and how it was asked.
    """

    models: Annotated[Names, Field(min_length=1)]
    data: Name
    results: Name
    split: Name = "validation"
    half: Literal[HALVES] | None = None  # type: ignore[valid-type]
    half_seed: Seed = 0
    questions: Count = 64
    tokens: Count = 128
    threads: Count | None = None

    def __post_init__(self) -> None:
        check_threads(self.threads)


def questions(settings: AnswersSettings) -> list[str]:
    """Different prompts, in the data's order.

    Raises:
        RunError: there are fewer that are texts.
    """
    rows, _ = load_preferences(settings.data, settings.split)
    chosen = (r for r in rows if settings.half is None or half_of(r, settings.half_seed) == settings.half)
    prompts = list(dict.fromkeys(r["prompt"] for r in chosen if isinstance(r.get("prompt"), str)))
    if len(prompts) < settings.questions:
        raise RunError(
            f"{settings.data} has {len(prompts)} questions that are texts, not {settings.questions}."
        )
    return prompts[: settings.questions]


def tokenizers(models: list[str]) -> list[PreTrainedTokenizerBase]:
    """The models' own, all of them before the first answers.

    Raises:
        RunError: a model's tokenizer has no template of chats.
        CheckpointError: there is no such model, or it has no tokenizer.
    """
    found = []
    for name in models:
        locate(name)
        found.append(load_tokenizer(name))
        if not found[-1].chat_template:
            raise RunError(f"{name}: its tokenizer has no chat template.")
    return found


def answers(
    name: str, tokenizer: PreTrainedTokenizerBase, asked: list[str], settings: AnswersSettings
) -> tuple[list[int], list[bool]]:
    """How many tokens each answer has, the last that ends it too, and whether it ended."""
    model = load_model(name)
    check_vocabulary(tokenizer, model)
    made = model if isinstance(model, EventDrivenMambaForCausalLM) else event_driven(model)
    made.set_decoding("compiled", settings.threads or cores())
    ends = np.atleast_1d(np.asarray(made.generation_config.eos_token_id))
    lengths, ended = [], []
    for question in tqdm(asked, name, leave=False):
        prompt = chat_prompt(tokenizer, question)
        found = made.generate(**prompt, max_new_tokens=settings.tokens, do_sample=False)[0]
        answer = found[prompt["input_ids"].shape[1] :]
        lengths.append(len(answer))
        ended.append(int(answer[-1]) in ends)
    return lengths, ended


@fail_clearly()
def main() -> None:
    settings = parse_settings(AnswersSettings, description=__doc__)
    quiet()
    refuse_changed_code(Path(settings.results))
    torch.set_num_threads(settings.threads or cores())
    own = tokenizers(settings.models)
    asked, about = questions(settings), provenance(settings)
    how = {"data": settings.data, "half": settings.half, "questions": len(asked), "most": settings.tokens}
    first: list[int] | None = None
    rows = []
    for name, tokenizer in zip(settings.models, own, strict=True):
        lengths, ended = answers(name, tokenizer, asked, settings)
        first = lengths if first is None else first
        change = paired_gap({"tokens": lengths}, {"tokens": first}) | {"from": settings.models[0]}
        record: dict[str, Any] = {"model": name, "tokens": lengths, "ended": ended, "change": change}
        put_record(Path(settings.results), how | record | about, ("model", *how))
        moved = f"{change['gap']:+.1f} [{change['low']:+.1f}, {change['high']:+.1f}]"
        rows.append([name, f"{np.mean(lengths):.1f}", moved, f"{100 - 100 * np.mean(ended):.0f}%"])
    header = ["model", "tokens of an answer", "change (95% interval)", f"cut at {settings.tokens}"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
