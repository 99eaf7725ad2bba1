"""Keys that a stage of the conversion and the distillation of a student share."""

from typing import Annotated

from pydantic import Field

from spiking_mamba.common.schema import Count, Fraction, Name, Natural, Positive, Seed, schema
from spiking_mamba.training.student import Length

NotNegative = Annotated[float, Field(ge=0)]


@schema
class StageSettings:
    """Settings of a training that goes on with its folder when it is called again.

    Attributes:
        output: folder of its state and its log.
        own_text, package_text: files of tokens (uint16), see ``write_text.py`` and ``prepare.py``.
        bits, group: to which mixers' matrices are rounded while they learn, groups of inputs sharing a scale:
            packing them so costs nothing more; bits 0: not rounded.
        rows, length: of a process's batch, and tokens of a row.
        own_share: of the rows that come from its own text.
        steps: 0: as many as `budget` allows at the speed of the first steps.
        budget: seconds of training, for ``steps: 0``.
        seconds: after which this call ends, its state kept; 0: at the end.
        learning_rate, final_learning_rate: after the warm-up, and at the end of a cosine.
        warmup: steps of a linear rise from 0.
        weight_decay: of matrices.
        clip: norm that all gradients together are cut to.
        piece: rows whose logits are made at a time.
        log_every: steps between two lines of the log.
        compiles: use ``torch.compile``.
        graph: replay steps as CUDA graphs.
        seed: of rows, and of what is drawn to begin with.
    """

    output: Name
    own_text: list[Name]
    package_text: list[Name]
    bits: Annotated[int, Field(ge=0, le=8)] = 0
    group: Count = 32
    rows: Count = 32
    length: Length = 512
    own_share: Fraction = 2 / 3
    steps: Natural = 0
    budget: Positive = 1200.0
    seconds: NotNegative = 0.0
    learning_rate: Positive = 1e-3
    final_learning_rate: NotNegative = 1e-5
    warmup: Natural = 100
    weight_decay: NotNegative = 0.01
    clip: Positive = 1.0
    piece: Count = 8
    log_every: Count = 50
    compiles: bool = True
    graph: bool = True
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not self.own_text and not self.package_text:
            raise ValueError("own_text or package_text must name files.")
        if self.rows % self.piece:
            raise ValueError(f"piece must divide rows={self.rows}, got {self.piece}.")
        if self.bits == 1:
            raise ValueError("bits must be 0 or 2 to 8, got 1.")
