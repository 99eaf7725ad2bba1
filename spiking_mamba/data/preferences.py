"""Preferences as token ids: from any data set of pairs or of labelled completions, bad rows counted.

pairs, report = read_preferences("answer_preference", "train", tokenizer, length=128)
pairs[0].prompt, pairs[0].completions  # ids; the chosen completion comes first
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from spiking_mamba.common.errors import DataError
from spiking_mamba.data.preference_rows import HALVES, draw, half_of, item_of, load_preferences

__all__ = [
    "BAD_ROWS",
    "CHAT_TEMPLATE",
    "HALVES",
    "Preference",
    "RowReport",
    "half_of",
    "load_preferences",
    "read_preferences",
]

# For conversations, where the tokenizer has no template of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
BAD_ROWS = (
    "missing column",
    "wrong type",
    "empty completion",
    "identical pair",
    "prompt longer than the limit",
)
_BATCH, _CHARACTERS = 1000, 2**22  # rows, and characters of them, tokenized at a time
_LONG_ENOUGH = 100_000  # characters that are never cut


@dataclass
class Preference:
    """One row as token ids.

    Attributes:
        prompt: its ids, at least one: that of the beginning of a text where the prompt is empty.
        completions: the chosen and the rejected one; or a single one, which ``label`` judges.
        label: whether a single completion is wanted; None for a pair.
        task, item: where the row comes from, if the data say so; rows of one item belong together.
    """

    prompt: list[int]
    completions: tuple[list[int], ...]
    label: bool | None = None
    task: str = "all"
    item: int | None = None


@dataclass
class RowReport:
    """What became of the rows of a source: ``read`` is ``kept`` plus the sum of ``bad``.

    Attributes:
        bad: rows by what is wrong with them, see ``BAD_ROWS``; each is counted once.
        truncated: of those kept, how many have a completion cut at the limit.
        overlap: items removed beforehand because an evaluation asks them, by set.
    """

    read: int = 0
    kept: int = 0
    truncated: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    overlap: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        bad = ", ".join(f"{count} {name}" for name, count in self.bad.items() if count) or "none"
        text = f"{self.read} rows read, {self.kept} kept, bad: {bad}; {self.truncated} cut at the limit"
        if self.overlap:
            text += f"; {sum(self.overlap.values())} items removed that an evaluation asks"
        return text

    to_dict = asdict


# From rows to texts -------------------------------------------------------------------------------------


class _BadRow(ValueError):
    """One of ``BAD_ROWS``."""


@dataclass
class _Texts:
    """A row with prompt and completions rendered: ``wholes`` are prompt and completion together."""

    prompt: str
    wholes: tuple[str, ...]
    label: bool | None
    row: dict[str, Any]

    @property
    def characters(self) -> int:
        return sum(map(len, (self.prompt, *self.wholes)))

    def cut(self, characters: int) -> "_Texts":
        """Without what lies beyond the limit in any case: tokenizing takes a hundred times a text's size."""
        return replace(
            self, prompt=self.prompt[:characters], wholes=tuple(w[:characters] for w in self.wholes)
        )


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )


def _texts(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, end: str) -> _Texts:
    paired = row.get("chosen") is not None or row.get("rejected") is not None
    names = ("chosen", "rejected") if paired else ("completion",)
    needed = [*names] if paired else [*names, "label"]
    if any(row.get(name) is None for name in needed):
        raise _BadRow("missing column")
    label = None if paired else row["label"]
    if label not in (None, True, False):
        raise _BadRow("wrong type")
    completions = [row[name] for name in names]
    prompt = row.get("prompt")
    if all(isinstance(completion, str) for completion in completions):
        if prompt is None:
            raise _BadRow("missing column")
        if not isinstance(prompt, str):
            raise _BadRow("wrong type")
        _check_completions(completions)
        wholes = tuple(prompt + completion.removesuffix(end) + end for completion in completions)
    else:
        if not all(map(_is_conversation, completions)):
            raise _BadRow("wrong type")
        if tokenizer.chat_template is None:
            tokenizer.chat_template = CHAT_TEMPLATE
        prompt, completions = _split_conversation(prompt, completions)
        _check_completions(completions)
        wholes = tuple(
            str(tokenizer.apply_chat_template(prompt + completion, tokenize=False))
            for completion in completions
        )
        prompt = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
    try:
        "".join((prompt, *wholes)).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        raise _BadRow("wrong type") from None
    return _Texts(prompt, wholes, None if label is None else bool(label), row)


def _split_conversation(prompt: Any, completions: list[Any]) -> tuple[list, list[list]]:
    """The messages that the completions answer, and the rest of each: many sets repeat the former in both."""
    if _is_conversation(prompt):
        return prompt, completions
    messages = min(_shared(completions), *(len(completion) - 1 for completion in completions))
    shared = completions[0][:messages]
    if not shared and isinstance(prompt, str):
        return [{"role": "user", "content": prompt}], completions
    if not shared:
        raise _BadRow("missing column")
    return shared, [completion[messages:] for completion in completions]


def _shared(sequences: Sequence[Sequence[Any]]) -> int:
    """How many first elements all of them have in common."""
    alike = takewhile(lambda places: all(p == places[0] for p in places), zip(*sequences, strict=False))
    return sum(1 for _ in alike)


def _content(completion: Any) -> str:
    return completion if isinstance(completion, str) else "".join(m["content"] for m in completion)


def _check_completions(completions: list[Any]) -> None:
    if any(not _content(completion).strip() for completion in completions):
        raise _BadRow("empty completion")
    if len(completions) > 1 and completions[0] == completions[1]:
        raise _BadRow("identical pair")


# From texts to ids --------------------------------------------------------------------------------------


def _tokenized(
    texts: Sequence[_Texts], tokenizer: PreTrainedTokenizerBase, length: int, report: RowReport
) -> Iterator[Preference]:
    if not texts:  # a batch without a good row; tokenizers fail on an empty list
        return
    flat = [text for t in texts for text in (t.prompt, *t.wholes)]
    ids = iter(
        tokenizer(flat, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    )
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for text in texts:
        prompt, wholes = next(ids), [next(ids) for _ in text.wholes]
        # tokens may merge over the border: a completion begins where the ids part
        shared = _shared([prompt, *wholes])
        if not shared:
            wholes, shared = [[begin, *whole] for whole in wholes], 1
        prompt = wholes[0][:shared]
        completions = tuple(whole[shared:length] for whole in wholes)
        if shared >= length:
            report.bad["prompt longer than the limit"] += 1
        elif len(completions) > 1 and completions[0] == completions[1]:  # the difference was cut off
            report.bad["identical pair"] += 1
        elif not all(completions):
            report.bad["empty completion"] += 1
        else:
            report.truncated += any(len(whole) > length for whole in wholes)
            task, item = str(text.row.get("task", "all")), item_of(text.row, None)
            yield Preference(prompt, completions, text.label, task, item)


def _read(
    rows: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    end: str,
    report: RowReport,
) -> Iterator[Preference]:
    """Usable rows, tokenized some at a time; the report counts what becomes of all of them."""
    texts: list[_Texts] = []
    enough = max(_LONG_ENOUGH, (length + 16) * max(map(len, tokenizer.get_vocab())))
    for row in rows:
        report.read += 1
        try:
            texts.append(_texts(row, tokenizer, end).cut(enough))
        except _BadRow as bad:
            report.bad[str(bad)] += 1
        if len(texts) == _BATCH or sum(text.characters for text in texts) > _CHARACTERS:
            yield from _tokenized(texts, tokenizer, length, report)
            texts = []
    yield from _tokenized(texts, tokenizer, length, report)


def read_preferences(
    source: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    end_of_text: bool = True,
    bad_rows: str = "skip",
    limit: int | None = None,
    per_task: bool = False,
    seed: int = 0,
    half: str | None = None,
    half_seed: int = 0,
    decontaminate: bool = False,
) -> tuple[list[Preference], RowReport]:
    """Rows of a source as token ids, shuffled, and a report of what became of them.

    A row has ``prompt``, ``chosen`` and ``rejected``, or ``prompt``, ``completion`` and ``label``; each text
    a string, or a conversation, a list of ``{"role": ..., "content": ...}``. Conversations need no
    ``prompt`` column where both completions begin with the same messages, or a single one's last message is
    the completion. They are rendered by the tokenizer's chat template; one without gets ``CHAT_TEMPLATE``.

    Args:
        source, split: see :func:`load_preferences`.
        tokenizer: whose ids they become.
        length: tokens of prompt and completion together, what follows is cut off.
        end_of_text: let completions that are strings end with the end-of-text token.
        bad_rows: 'skip' leaves them out and counts them, 'refuse' raises; see ``BAD_ROWS``.
        limit, per_task: how many rows to take at most, drawn by ``seed``; or of each task, how many items,
            with all their rows, where ``per_task``.
        seed: of the order.
        half: one of ``HALVES``, to take the rows of those questions alone, see :func:`half_of`; None: all.
        half_seed: of the division.
        decontaminate: see :func:`load_preferences`.

    Raises:
        DataError: there is no such source, no usable row in it, or a bad one that is not to be skipped.
        ValueError: an argument is out of range.
    """
    if bad_rows not in ("skip", "refuse"):
        raise ValueError(f"bad_rows must be 'skip' or 'refuse', got {bad_rows!r}.")
    if length < 2:
        raise ValueError(f"length must be at least 2, got {length}.")
    end = tokenizer.eos_token if end_of_text else ""
    if end is None:
        raise DataError("The tokenizer has no end-of-text token for the completions to end with.")
    rows, overlap = load_preferences(source, split, decontaminate)
    report = RowReport(bad=dict.fromkeys(BAD_ROWS, 0), overlap=overlap)
    chosen = None if half is None else [half_of(row, half_seed) == half for row in rows]
    drawn = (rows[index] for index in draw(rows, limit, per_task, seed, chosen))
    preferences = list(_read(drawn, tokenizer, length, end, report))
    report.kept = len(preferences)
    if bad_rows == "refuse" and any(report.bad.values()):
        raise DataError(f"{source}: {report}. bad_rows: skip leaves the bad rows out.")
    if not preferences:
        raise DataError(f"{source} holds no usable row: {report}.")
    if len(kinds := {preference.label is None for preference in preferences}) > 1:
        raise DataError(f"{source} mixes pairs and labelled completions: {Counter(kinds)}.")
    return preferences, report
