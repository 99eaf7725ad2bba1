"""What integer weights and 16-bit states cost: event-driven models on held-out text, beside float32.

python recipes/benchmark/cpu_perplexity.py [--model recipes/quickstart/student --text wikipedia-leads]

Rows of held-out text. "int4, calibrated" is rounded for rows of training parts, of documents that are not
evaluated; "within 1%" keeps those layers in int8 that cost most for their bytes, by an estimate on the same
text. Weights are rounded and measured by torch, which has the decoder's integers; states in 16 bits by the
compiled decoder, token by token. Intervals of 95% resample the rows, in pairs with those of float32. --costs
prints the estimate by kinds of layers, and evaluates nothing.
"""

import argparse
import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from neurons import EventDrivenLinear
from spiking_mamba import SpikingMambaForCausalLM, event_driven
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.machine import cores
from spiking_mamba.common.progress import quiet
from spiking_mamba.data import draw_rows
from spiking_mamba.evaluation.scoring import kl_and_agreement
from spiking_mamba.evaluation.statistics import paired_gap
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.model.cpu_decoder import CpuDecoder
from spiking_mamba.model.rounding_cost import layers_of, rounding_costs, second_moments
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.reports.document import markdown_table

OFFERED = {"int8": 0.002, "int4": 0.01, "bfloat16": 0.002}  # how much more perplexity is acceptable


class Scores(NamedTuple):
    """A model on the rows: nats a token of each row, and over all of them KL and same likeliest tokens."""

    nats: list[float]
    kl: float
    same: float


def logits_of(model: SpikingMambaForCausalLM, row: torch.Tensor) -> torch.Tensor:
    """Behind every token of a row but the last, ``[length - 1, vocabulary]``."""
    with torch.no_grad():
        return model(row[None, :-1], use_cache=False).logits[0].float()


def decoded(decoder: CpuDecoder, row: torch.Tensor) -> torch.Tensor:
    """The same, by the compiled decoder."""
    decoder.reset()
    return torch.stack([torch.from_numpy(decoder.step(token).copy()) for token in row[:-1].tolist()])


def scored(run, rows: torch.Tensor, right: list[torch.Tensor]) -> Scores:
    """What ``run(row)``, logits, is worth beside the right ones."""
    nats, kl, same = [], 0.0, 0
    for row, wanted in zip(rows, right, strict=True):
        logits = run(row)
        nats.append(F.cross_entropy(logits, row[1:]).item())
        more_kl, more_same = kl_and_agreement(logits, wanted.float())
        kl, same = kl + more_kl, same + more_same
    tokens = rows[:, 1:].numel()
    return Scores(nats, kl / tokens, same / tokens)


def megabytes(made: SpikingMambaForCausalLM) -> float:
    """Of the integers of projections and head, with the scales of groups."""
    layers = [layer for layer in made.modules() if isinstance(layer, EventDrivenLinear)]
    tensors = [
        tensor for layer in layers for tensor in (layer.weight, layer.group_scale) if tensor is not None
    ]
    return sum(tensor.nbytes for tensor in tensors) / 1e6


def row_of(names: list[str], size: str, own: Scores, base: Scores, most: float) -> list[str]:
    """A line of the table; ``names``: of the weights' and the states' form."""
    found = paired_gap({"text": own.nats}, {"text": base.nats})
    more, low, high = (math.expm1(found[key]) for key in ("gap", "low", "high"))
    return [
        *names, size, f"{math.exp(sum(own.nats) / len(own.nats)):.3f}",
        f"{more:+.2%} ({low:+.2%} to {high:+.2%})",
        f"{own.kl:.4f}", f"{own.same:.1%}", f"{'yes' if more <= most else 'no'}, {most:.1%}",
    ]  # fmt: skip


def costs(model: SpikingMambaForCausalLM, seen: torch.Tensor) -> str:
    """What 4 bits are estimated to cost where, each weight rounded to the nearest or for what it gets."""
    layers = layers_of(model)
    moments = second_moments(model, seen, layers)
    found = []
    for given in (dict.fromkeys(layers), moments):
        made = {n: EventDrivenLinear.from_linear(layers[n], "int4", moments=given[n]) for n in layers}
        found.append(rounding_costs(model, seen, layers, made, moments))
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kind = name.rpartition(".")[2].replace("lm_head", "head")
        first = "" if kind == "head" else ", first block" if ".layers.0." in name else ", others"
        kinds.setdefault(kind + first, []).append(name)
    kinds["all"] = list(layers)
    body = []
    for kind, names in kinds.items():
        weights = sum(layers[name].weight.numel() for name in names)
        nats = [sum(each[name] for name in names) for each in found]
        body.append(
            [
                kind,
                f"{weights / 1e6:.2f}",
                *(f"{x:.5f}" for x in nats),
                f"{1e3 * nats[1] / weights * 1e6:.2f}",
            ]
        )
    heads = ["layers", "million weights", "nearest", "calibrated", "calibrated, 0.001 nats a million weights"]
    return markdown_table(heads, body)


@fail_clearly()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="recipes/quickstart/student")
    parser.add_argument("--text", nargs="+", default=["wikipedia-leads"])
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--calibration", type=int, default=128, help="rows, of the same length")
    parser.add_argument("--calibrate", nargs="+", help="texts to round for; by default the one evaluated")
    parser.add_argument("--costs", action="store_true", help="estimate where it is lost, and no more")
    parser.add_argument("--threads", type=int, default=cores())
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model).eval(), load_tokenizer(args.model)
    rows = torch.tensor(draw_rows(args.text, tokenizer, args.length, args.rows, "held_out")["input_ids"])
    sources = args.calibrate or args.text
    seen = torch.tensor(draw_rows(sources, tokenizer, args.length, args.calibration, "train")["input_ids"])
    if args.costs:
        print(costs(model, seen))
        return
    right = [logits_of(model, row).half() for row in rows]
    base = scored(lambda row: logits_of(model, row), rows, right)
    first = math.exp(sum(base.nats) / len(base.nats))
    table = [["float32", "float32", "", f"{first:.3f}", "", "", "", ""]]
    forms = (
        ("int8", "int8", {}),
        ("int4", "int4", {}),
        ("int4, calibrated", "int4", {"calibration": seen}),
        ("int4, calibrated, within 1%", "int4", {"calibration": seen, "tolerance": 0.01}),
        ("int4, calibrated, within 0.5%", "int4", {"calibration": seen, "tolerance": 0.005}),
    )
    for name, weights, how in forms:
        made = event_driven(model, weights, **how)
        own = scored(lambda row, made=made: logits_of(made, row), rows, right)
        table.append(row_of([name, "float32"], f"{megabytes(made):.2f}", own, base, OFFERED[weights]))
        if weights == "int8":
            integers, size = own, f"{megabytes(made):.2f}"
    decoder = CpuDecoder(event_driven(model, "int8", "bfloat16"), args.threads)
    own = scored(lambda row: decoded(decoder, row), rows, right)
    table.append(row_of(["int8", "bfloat16 †"], size, own, integers, OFFERED["bfloat16"]))
    heads = ["weights", "states", "MB", "perplexity", "more (95%)", "KL", "same likeliest", "acceptable"]
    print(
        f"{', '.join(args.text)}: {len(rows)} held-out rows of {args.length} tokens; rounded for {len(seen)} "
        f"rows of {', '.join(sources)}; KL in nats a token\n"
    )
    print(markdown_table(heads, table))
    print("\n† more than int8 with states in float32")


if __name__ == "__main__":
    main()
