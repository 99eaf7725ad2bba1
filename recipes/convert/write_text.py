"""Text that a Transformer writes itself, to be matched on: as much as one likes, and nothing evaluated.

python recipes/convert/write_text.py recipes/convert/write_text.yaml
"""

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from decode import Openings, Writer
from filters import Evaluated, Filter
from llama import Llama
from pydantic import Field
from tokens import END

from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.schema import Count, Name, Natural, Positive, Seed, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.model.source import load_source
from spiking_mamba.training.student import Length

STARTED = time.monotonic()


@schema
class WriteSettings:
    """Every field is a key of the YAML file.

    Attributes:
        source: the Transformer, see ``source.load_source``.
        data: folder that ``prepare.py`` has written.
        output: file for the tokens (uint16); of several processes each adds its number to the name. What it
            is made of stands in a JSON file beside it.
        parts: batches to write; 0: as many as fit into `seconds`.
        seconds: after which it ends, counted from its start.
        first_part: number of the first batch: another number, other text.
        rows, length: of a batch.
        temperature, min_p: of the sampling.
        ends_turn: the token that ends a turn of a chat.
        overlap: documents that share so many tokens in a row with an evaluated text are dropped.
        every: positions of attention that one CUDA graph reads more than the one before.
        compiles: use ``torch.compile``.
        seed: of sampling and openings; with a batch's number and the process's it makes that batch again.
    """

    source: Name
    data: Name
    output: Name
    parts: Natural = 0
    seconds: float = 120.0
    first_part: Natural = 0
    rows: Count = 2048
    length: Length = 512
    temperature: Positive = 0.9
    min_p: Annotated[float, Field(gt=0, le=1)] = 0.04
    ends_turn: Natural = 2
    overlap: Count = 13
    every: Count = 64
    compiles: bool = True
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not self.parts and self.seconds <= 0:
            raise ValueError("Set parts, or seconds that are positive.")


def read_openings(path: Path, rows: int, device: torch.device) -> Openings:
    """The table of ``openings.npz``; a row can take up to 64 of them."""
    held = np.load(path)
    lengths = held["lengths"].astype(np.int64)
    table = np.zeros((len(lengths), lengths.max()), np.int64)
    table[np.arange(table.shape[1]) < lengths[:, None]] = held["tokens"]
    orders = torch.zeros(rows, 64, dtype=torch.long, device=device)
    return Openings(torch.from_numpy(table).to(device), torch.from_numpy(lengths).to(device), orders)


def main_loop(settings: WriteSettings, rank: int, device: torch.device) -> dict[str, Any]:
    """Write, filter and keep part after part; returns what stands in the JSON file."""
    source = Llama.from_transformers(load_source(settings.source))
    source = source.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    data = Path(settings.data)
    openings = read_openings(data / "openings.npz", settings.rows, device)
    kept = Filter(Evaluated(np.load(data / "evaluated.npz")["texts"], settings.overlap, END, device))
    writer = Writer(
        source, settings.rows, settings.length, openings, END, settings.ends_turn, settings.temperature,
        settings.min_p, settings.every, settings.compiles,
    )  # fmt: skip
    if device.type == "cuda":
        writer.capture()
    path = Path(settings.output)
    path = path.with_name(f"{path.stem}-{rank}{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft, part, begun = path.with_name(path.name + ".part"), 0, time.monotonic()
    print(f"[{begun - STARTED:6.1f} s] process {rank} writes {path}", flush=True)
    with draft.open("wb") as file:
        while part < settings.parts or not settings.parts:
            took = (time.monotonic() - begun) / max(1, part)
            if not settings.parts and time.monotonic() - STARTED + took > settings.seconds:
                break
            seed = (settings.seed * 1_000_003 + rank) * 1_000_003 + settings.first_part + part
            torch.manual_seed(seed)  # of every device
            order = np.random.default_rng(seed).integers(len(openings.lengths), size=openings.orders.shape)
            tokens, starts = writer.write(torch.from_numpy(order).to(device))
            if part == 0:
                print(f"mean log-probability {check(source, tokens):.3f}", flush=True)
            file.write(kept(tokens, starts).cpu().numpy().astype(np.uint16).tobytes())
            part += 1
            speed = part * settings.rows * settings.length / (time.monotonic() - begun)
            share = kept.counts["kept tokens"] / kept.counts["seen tokens"]
            print(f"part {part}: {speed:,.0f} tokens/s, {share:.3f} of them kept", flush=True)
    facts = {"settings": asdict(replace(settings, parts=part)), "process": rank, "counts": kept.counts}
    facts["tokens_per_second"] = round(part * settings.rows * settings.length / (time.monotonic() - begun))
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    draft.replace(path)
    return facts


@torch.no_grad()
def check(source: Llama, tokens: torch.Tensor) -> float:
    """Mean log-probability of written tokens by the whole forward pass.

    Far below the sampling's if a step went wrong.
    """
    rows = tokens[: min(8, len(tokens))]
    logits = torch.nn.functional.linear(source.hidden_states(rows), source.head).float()
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, rows[:, 1:, None])
    return float(log_probs[:, rows.shape[1] // 4 :].mean())


@fail_clearly()
def main() -> None:
    settings = parse_settings(WriteSettings, description=__doc__)
    quiet()
    rank = int(os.environ.get("RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    print(json.dumps(main_loop(settings, rank, device)["counts"], indent=1), flush=True)


if __name__ == "__main__":
    main()
