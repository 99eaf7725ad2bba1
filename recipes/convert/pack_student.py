"""Pack a spiking student: mixers in few bits, of its MLPs what it adds to the source's, norms and thresholds.

python recipes/convert/pack_student.py recipes/distill/pack.yaml state=runs/students/63/state.pt
"""

from pathlib import Path
from typing import Any

import torch
from flat import LowRankParameters
from packing import pack_mixers
from student import restored_student

from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.files import refuse_file
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.schema import Name, Positive, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.model.converted import STUDENT, is_converted, read_index
from spiking_mamba.model.pretrained import OWN_IN_FLOAT32

FILE = "student.safetensors"


@schema
class PackStudentSettings:
    """Every field is a key of the YAML file.

    Attributes:
        state: a student's ``state.pt``, trained with `bits` and a `rank`: what is packed is what was trained,
            but for factors of a low rank, which are rounded to float16.
        output: folder for the packed student.
        megabytes: of a file, at most.
    """

    state: Name
    output: Name
    megabytes: Positive = 15.0


def own_tensors(student: SpikingMambaForCausalLM, mlps: LowRankParameters) -> dict[str, torch.Tensor]:
    """What a student has of its own beside its mixers, as ``read_converted`` takes it."""
    tensors = {}
    numbers = [k for k in range(len(student.backbone.layers)) if student.config.block_type(k) == "mlp"]
    for k, block in enumerate(student.backbone.layers):
        tensors[f"backbone.layers.{k}.norm.weight"] = block.norm.weight.data.clone()
    for name, (a, b) in mlps.pairs(mlps.factors.data).items():
        for row, k in enumerate(numbers):
            for part, tensor in (("a", a), ("b", b)):
                tensors[f"backbone.layers.{k}.{name}:{part}"] = tensor[row].half().contiguous()
    for row, k in enumerate(numbers):
        for name, parameter in mlps.modules[row].named_parameters():
            if name.endswith(OWN_IN_FLOAT32):
                tensors[f"backbone.layers.{k}.{name}"] = parameter.data.clone()
    return tensors


def pack_student(state: str | Path, folder: Path, megabytes: float = 15.0) -> list[Path]:
    """Write a student's files, the index first.

    Raises:
        RunError: it was not trained for it, or does not start from packed mixers.
    """
    student, parts, progress = restored_student(state)
    settings = progress["settings"]
    if not settings["bits"]:
        raise RunError(f"{state}: mixers were not trained in few bits (bits: 0).")
    mlps = parts.parts[-1]
    if not isinstance(mlps, LowRankParameters):
        raise RunError(f"{state}: MLPs were trained whole (rank: null): a low rank packs small.")
    if not is_converted(Path(settings["start"])):
        raise RunError(
            f"{settings['start']} holds no packed mixers: it does not say where its MLPs are from."
        )
    source = read_index(Path(settings["start"]))["source"]
    facts: dict[str, Any] = {"progress": progress, "group": settings["group"], STUDENT: FILE}
    own = {FILE: own_tensors(student, mlps)}
    return pack_mixers(
        student, folder, source, settings["bits"], settings["group"], None, megabytes, facts, own
    )


@fail_clearly()
def main() -> None:
    settings = parse_settings(PackStudentSettings, description=__doc__)
    quiet()
    refuse_file(Path(settings.output))
    paths = pack_student(settings.state, Path(settings.output), settings.megabytes)
    for path in paths:
        print(f"{path} {path.stat().st_size:,} bytes")
    print(f"{sum(path.stat().st_size for path in paths):,} bytes in all")


if __name__ == "__main__":
    main()
