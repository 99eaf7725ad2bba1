"""Pack a stage's mixers: python recipes/convert/pack.py recipes/convert/pack.yaml"""

from typing import Annotated

import torch
from conversion import convert
from flat import load_state
from llama import Llama
from packing import pack_mixers, second_moments
from pydantic import Field
from tokens import Stream, read_tokens

from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.schema import Count, Name, Natural, Positive, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.model.converted import mixers_of
from spiking_mamba.model.source import load_source
from spiking_mamba.training.student import Length


@schema
class PackSettings:
    """Every field is a key of the YAML file.

    Attributes:
        source: the Transformer, see ``source.load_source``.
        state: a stage's ``state.pt``; what it learned in few bits is packed in as many without a loss.
        output: folder for the packed mixers.
        bits, group: see ``packing.integers``.
        megabytes: of a file, at most.
        expand: width of a mixer over the residual stream's.
        calibration: file of tokens (uint16); rounding errors are fed back by what projections are given on
            `rows` of `length` of them. null: they are not fed back.
        rows, length: of the calibration.
    """

    source: Name
    state: Name
    output: Name
    bits: Annotated[int, Field(ge=2, le=8)] = 8
    group: Natural = 0
    megabytes: Positive = 15.0
    expand: Count = 2
    calibration: Name | None = None
    rows: Count = 64
    length: Length = 512


@fail_clearly()
def main() -> None:
    settings = parse_settings(PackSettings, description=__doc__)
    quiet()
    model = convert(Llama.from_transformers(load_source(settings.source)), settings.expand)
    progress = load_state(mixers_of(model), settings.state)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    moments = {}
    if settings.calibration is not None:
        stream = Stream(read_tokens([settings.calibration]), settings.length, 0, device)
        moments = second_moments(model, stream.take(0, settings.rows))
    facts = {"progress": progress, "group": settings.group, "calibration": settings.calibration}
    paths = pack_mixers(
        model,
        settings.output,
        settings.source,
        settings.bits,
        settings.group,
        moments,
        settings.megabytes,
        facts,
    )
    for path in paths:
        print(f"{path} {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
