"""Pack a stage's mixers: python recipes/convert/pack.py recipes/convert/pack.yaml"""

from dataclasses import dataclass

import torch
from conversion import convert, mixers_of
from flat import FlatParameters
from llama import Llama
from packing import pack_mixers
from source import load_source

from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.settings import parse_settings


@dataclass
class PackSettings:
    """Every field is a key of the YAML file.

    Attributes:
        source: the Transformer, see ``source.load_source``.
        state: a stage's ``state.pt``.
        output: folder for the packed mixers.
        bits, group: see ``packing.integers``.
        megabytes: of a file, at most.
        expand: width of a mixer over the residual stream's.
    """

    source: str
    state: str
    output: str
    bits: int = 8
    group: int = 0
    megabytes: float = 15.0
    expand: int = 2


@fail_clearly()
def main() -> None:
    settings = parse_settings(PackSettings, description=__doc__)
    quiet()
    model = convert(Llama.from_transformers(load_source(settings.source)), settings.expand)
    state = torch.load(settings.state, map_location="cpu", weights_only=True)
    flat = FlatParameters(mixers_of(model))
    flat.matrices.data.copy_(state["matrices"])
    flat.vectors.data.copy_(state["vectors"])
    facts = {"progress": state["progress"]}
    paths = pack_mixers(
        model, settings.output, settings.bits, settings.group, megabytes=settings.megabytes, facts=facts
    )
    for path in paths:
        print(f"{path} {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
