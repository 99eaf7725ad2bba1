"""Measure a student beside its teacher on texts, document by document, and keep the sums.

python recipes/ablate/documents.py recipes/ablate/documents.yaml

Perplexities over the same documents are compared in pairs: an interval over documents says how far another
draw of text of that kind may move what is reported, which seeds do not tell.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCardData
from measures import text_sha256
from pydantic import Field

from spiking_mamba import SpikingMambaForCausalLM, data
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.files import file_sha256
from spiking_mamba.common.progress import quiet, reporting
from spiking_mamba.common.provenance import provenance, refuse_changed_code
from spiking_mamba.common.records import put_record
from spiking_mamba.common.schema import Count, Name, Names, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.evaluation.scoring import kl_and_agreement
from spiking_mamba.model.checkpoint import load_dense, load_model
from spiking_mamba.model.modes import evaluating
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.reports.hub_card import Score, card_data, write_hub_card
from spiking_mamba.spikes.counting import count_spikes
from spiking_mamba.spikes.counts import SpikeCounts
from spiking_mamba.training.student import Length

IDENTITY = ("student", "text", "length")


@schema
class DocumentSettings:
    """Keys of the YAML file.

    Attributes:
        teacher: checkpoint folder of a dense model.
        student: checkpoint folder of a spiking one, which has the teacher's tokenizer.
        texts: of what, see ``spiking_mamba.data.load_text``.
        length: tokens a row.
        batch_size: rows a forward pass.
        results: file of the records, one a student, text and length.
        card: put the perplexities at the head of the student's ``README.md``.
    """

    teacher: Name
    student: Name
    texts: Annotated[Names, Field(min_length=1)]
    length: Length = 512
    batch_size: Count = 8
    results: Name = "docs/results/documents.jsonl"
    card: bool = False


def documents_of(ids: np.ndarray, end: int) -> np.ndarray:
    """Which document each token of packed rows belongs to, the end-of-text behind one being its last.

    Args:
        ids: int ``[rows, length]``, documents joined by ``end`` and cut.
        end: the end-of-text token.

    Returns:
        int64 ``[rows, length]``, from 0.
    """
    ends = ids.reshape(-1) == end
    return (np.cumsum(ends) - ends).reshape(ids.shape)


def compare(
    teacher: SpikingMambaForCausalLM,
    student: SpikingMambaForCausalLM,
    rows: datasets.Dataset,
    end: int,
    batch_size: int,
) -> tuple[dict[str, Any], SpikeCounts]:
    """Sums over tokens in float64 by document, and the student's spikes.

    Returns:
        ``documents``: ``[tokens predicted, nats of the teacher, nats of the student]`` of each, in order;
        ``tokens``; ``kl``: mean KL divergence of the student from the teacher, nats a token; ``top1``: the
        share of tokens at which both have the same most likely next token. A row's first token is not
        predicted.
    """
    ids = np.asarray(rows["input_ids"])  # [rows, length]
    owner = documents_of(ids, end)
    sums = np.zeros((int(owner.max()) + 1, 3))
    kl, same = 0.0, 0
    with (
        torch.no_grad(), evaluating(teacher), evaluating(student), count_spikes(student) as spikes,
        reporting(True, "comparing") as share,
    ):  # fmt: skip
        for start in range(0, len(ids), batch_size):
            batch = torch.as_tensor(ids[start : start + batch_size]).long()
            theirs, ours = (
                model(input_ids=batch, use_cache=False).logits[:, :-1].float() for model in (teacher, student)
            )  # [batch, length - 1, vocabulary]
            nats = [
                F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").double()
                for logits in (theirs, ours)
            ]
            of = owner[start : start + batch_size, 1:].reshape(-1)
            columns = (torch.ones_like(nats[0]), *nats)
            for column, values in enumerate(columns):
                np.add.at(sums[:, column], of, values.reshape(-1).numpy())
            comparison = kl_and_agreement(ours, theirs)
            kl, same = kl + comparison[0], same + comparison[1]
            share((start + len(batch)) / len(ids))
    tokens = int(sums[:, 0].sum())
    documents = [[int(n), round(a, 4), round(b, 4)] for n, a, b in sums.tolist() if n]
    return {"documents": documents, "tokens": tokens, "kl": kl / tokens, "top1": same / tokens}, spikes


def perplexity_ratio(
    documents: Sequence[Sequence[float]], resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """By how much the student's perplexity is higher, with a paired bootstrap interval over documents.

    Args:
        documents: ``[tokens, nats of the teacher, nats of the student]`` of each.
        resamples, seed: of the percentile bootstrap; documents are drawn whole, long ones as often as short.

    Returns:
        ``teacher``, ``student``: perplexities; ``over``: their ratio less 1; ``low``, ``high``: of its 95 %
        interval; ``documents``: how many.
    """
    tokens, teacher, student = np.asarray(documents, float).T
    random, count = np.random.default_rng(seed), len(tokens)
    drawn = random.multinomial(count, np.full(count, 1 / count), size=resamples)  # [resamples, documents]
    ratios = np.exp(drawn @ (student - teacher) / (drawn @ tokens)) - 1
    low, high = np.quantile(ratios, [0.025, 0.975])
    theirs, ours = np.exp([teacher.sum() / tokens.sum(), student.sum() / tokens.sum()])
    ratio = {"teacher": theirs, "student": ours, "over": ours / theirs - 1, "low": low, "high": high}
    return {key: float(value) for key, value in ratio.items()} | {"documents": count}


def perplexity_score(record: dict[str, Any], resamples: int = 10_000, seed: int = 0) -> Score:
    """A student's perplexity on a recorded text, with a bootstrap interval over documents."""
    tokens, _, student = np.asarray(record["documents"], float).T
    random, count = np.random.default_rng(seed), len(tokens)
    drawn = random.multinomial(count, np.full(count, 1 / count), size=resamples)  # [resamples, documents]
    low, high = np.quantile(np.exp(drawn @ student / (drawn @ tokens)), [0.025, 0.975])
    value = float(np.exp(student.sum() / tokens.sum()))
    name = f"{Path(record['text']).stem.replace('_', '-')} documents"
    of = f"over {count} documents, {record['tokens']} tokens in rows of {record['length']}"
    return Score(name, "perplexity", value, of, (float(low), float(high)))


def head(student: str, records: Sequence[dict[str, Any]]) -> ModelCardData:
    """What the hub reads at the head of the student's card; its teacher and its text have no name there."""
    scores = [perplexity_score(record) for record in records]
    return card_data(Path(student).name, scores, "apache-2.0", spiking=True)


def measure(settings: DocumentSettings) -> None:
    refuse_changed_code(Path(settings.results))
    teacher, student = load_dense(settings.teacher).eval(), load_model(settings.student).eval()
    tokenizer = load_tokenizer(settings.teacher)
    records = []
    for text in settings.texts:
        rows = data.tokenize(data.load_text(text), tokenizer, settings.length).with_format("numpy")
        comparison, spikes = compare(teacher, student, rows, tokenizer.eos_token_id, settings.batch_size)
        digits = spikes.digit_accumulations
        record = {"student": settings.student, "text": text, "length": settings.length} | comparison
        record["spikes"] = {
            "mean_abs": spikes.mean_abs,
            "nonzero_share": spikes.nonzero_share,
            "signed_digits": None if digits is None else digits / spikes.dense_macs,
        }
        record["depends"] = {
            "text": text_sha256(text),
            **{
                name: file_sha256(Path(getattr(settings, name), "model.safetensors"))
                for name in ("teacher", "student")
            },
        }
        put_record(Path(settings.results), record | provenance(settings), IDENTITY)
        records.append(record)
        ratio = perplexity_ratio(comparison["documents"])
        print(
            f"{text}, {settings.length}: teacher {ratio['teacher']:.3f}, student {ratio['student']:.3f}, "
            f"{100 * ratio['over']:+.2f} % ({100 * ratio['low']:+.2f} to {100 * ratio['high']:+.2f} over "
            f"{ratio['documents']} documents), KL {comparison['kl']:.4f} nats, same top token "
            f"{comparison['top1']:.1%}",
            flush=True,
        )
    if settings.card:
        write_hub_card(settings.student, head(settings.student, records))


@fail_clearly()
def main() -> None:
    settings = parse_settings(DocumentSettings, description=__doc__)
    quiet()
    measure(settings)


if __name__ == "__main__":
    main()
