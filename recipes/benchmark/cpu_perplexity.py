"""What integers and 16-bit states cost: perplexity of event-driven models, decoded token by token.

python recipes/benchmark/cpu_perplexity.py [--model recipes/quickstart/student --text wikipedia-leads]

Rows of held-out text. "int4, calibrated" is rounded for rows of the text's training part. Weights are rounded
and measured by torch, which has the decoder's integers; states in 16 bits by the compiled decoder, token by
token. float32 is the reference.
"""

import argparse
import itertools
import math

import numpy as np
import torch

from spiking_mamba import SpikingMambaForCausalLM, event_driven
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.machine import cores
from spiking_mamba.common.progress import quiet
from spiking_mamba.data import load_text, tokenize
from spiking_mamba.evaluation import perplexity
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.model.cpu_decoder import CpuDecoder
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.reports.document import markdown_table

OFFERED = {"int8": 0.002, "int4": 0.01, "bfloat16": 0.002}  # how much more perplexity is acceptable


def decoded_losses(model: SpikingMambaForCausalLM, weights: str, states: str, rows: list) -> np.ndarray:
    """The cross-entropy of every token behind the first of each row, in nats, ``[rows, length - 1]``."""
    decoder = CpuDecoder(event_driven(model, weights, states), cores())
    losses = []
    for row in rows:
        decoder.reset()
        for token, target in itertools.pairwise(row):
            logits = decoder.step(token).astype(np.float64)
            top = logits.max()
            losses.append(top + math.log(np.exp(logits - top).sum()) - logits[target])
    return np.array(losses).reshape(len(rows), -1)


def row_of(weights: str, states: str, own: float, base: float, most: float) -> list[str]:
    change = own / base - 1
    return [
        weights,
        states,
        f"{own:.3f}",
        f"{change:+.2%}",
        f"{'yes' if change <= most else 'no'}, {most:.1%}",
    ]


@fail_clearly()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="recipes/quickstart/student")
    parser.add_argument("--text", default="wikipedia-leads")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--calibration", type=int, default=128, help="rows, of the same length")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(cores())
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    text = tokenize(load_text(args.text, split="held_out"), tokenizer, args.length).shuffle(seed=0)
    text = text.select(range(min(args.rows, len(text))))
    perplexities = {"float32": perplexity(model, text, progress=False)["perplexity"]}
    table = [["float32", "float32", f"{perplexities['float32']:.3f}", "", ""]]
    seen = tokenize(load_text(args.text, split="train"), tokenizer, args.length).shuffle(seed=0)
    calibration = torch.tensor(seen.select(range(min(args.calibration, len(seen))))["input_ids"])
    for weights, ids in (("int8", None), ("int4", None), ("int4", calibration)):
        found = perplexity(event_driven(model, weights, calibration=ids), text, progress=False)["perplexity"]
        perplexities.setdefault(weights, found)
        name = weights if ids is None else f"{weights}, calibrated"
        table.append(row_of(name, "float32", found, perplexities["float32"], OFFERED[weights]))
    losses = decoded_losses(model, "int8", "bfloat16", [list(map(int, row)) for row in text["input_ids"]])
    own = math.exp(losses.mean())
    table.append(row_of("int8", "bfloat16", own, perplexities["int8"], OFFERED["bfloat16"]))
    heads = ["weights", "states", "perplexity", "more than with float32 there", "within what is acceptable"]
    print(f"{args.text}, {len(text)} held-out rows of {args.length} tokens\n")
    print(markdown_table(heads, table))


if __name__ == "__main__":
    main()
