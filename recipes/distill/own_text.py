"""Text that a teacher writes itself, to distil on: it was trained on none of it, and there is no end of it.

python recipes/distill/own_text.py recipes/distill/own_text.yaml
"""

import json
import shutil
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import datasets
import torch
from pydantic import Field
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from spiking_mamba import SpikingMambaForCausalLM, data
from spiking_mamba.common.claims import LOCK, claim_folder
from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.files import unused, write_whole
from spiking_mamba.common.interruption import interruptible
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.schema import Count, Name, Positive, Seed, Sources, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.model.checkpoint import load_dense
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.training.student import Length


@schema
class OwnTextSettings:
    """Settings of the text; every field is a key of the YAML file.

    Attributes:
        teacher: folder or hub name of a dense Mamba2 checkpoint.
        output: the ``.jsonl`` file to write, a document a line, ``{"text": ...}``.
        data: text whose passages the teacher goes on with, see ``spiking_mamba.data.load_text``.
        tokens: how many to write, passages included, in whole batches; a document that the teacher ends
            early is shorter.
        tokenizer: folder or hub name of its tokenizer; null where it lies beside the teacher.
        passage: tokens of a passage.
        length: tokens of a document, its passage included.
        batch_size: documents at a time.
        temperature: of the sampling; 1 draws from the teacher's own distribution.
        seed: of passages and sampling.
    """

    teacher: Name
    output: Name
    data: Sources
    tokens: Annotated[int, Field(ge=1, lt=2**50)]
    tokenizer: Name | None = None
    passage: Count = 16
    length: Length = 512
    batch_size: Count = 64
    temperature: Positive = 1.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.passage >= self.length:
            raise ValueError(f"passage must lie between 0 and length={self.length}, got {self.passage}.")
        if Path(self.output).suffix != ".jsonl":
            raise ValueError(f"output must be a .jsonl file, got {self.output}.")


def write_part(settings: OwnTextSettings, part: int, teacher: Any, tokenizer: Any, passages: Any) -> str:
    """The lines of a part: ``batch_size`` passages, and what the teacher makes of them."""
    end = tokenizer.eos_token_id
    torch.manual_seed(1_000_003 * settings.seed + part)  # of every device
    chosen = torch.randint(len(passages), (settings.batch_size,)).tolist()
    prompts = torch.tensor([passages[place]["input_ids"] for place in chosen], device=teacher.device)
    written = teacher.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=settings.length - settings.passage,
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,  # nothing is left out
        pad_token_id=end,
    )
    texts = [
        tokenizer.decode(list(document))
        for ids in written.tolist()
        for ended, document in groupby(ids, lambda token: token == end)
        if not ended
    ]
    return "".join(json.dumps({"text": text}) + "\n" for text in texts if text.strip())


def write(settings: OwnTextSettings) -> None:
    """Write the file, in parts with a seed each, so that a stopped run goes on where it was."""
    target = Path(settings.output)
    if target.exists():
        raise RunError(f"{target} is there already: delete it, or choose another output.")
    teacher = load_dense(settings.teacher).eval()
    tokenizer = load_tokenizer(settings.teacher, settings.tokenizer)
    teacher.to("cuda" if torch.cuda.is_available() else "cpu")
    passages = data.tokenize(data.load_text(settings.data), tokenizer, settings.passage)

    folder = target.with_name(f"{target.name}.parts")
    about = folder / "settings.json"
    if not unused(folder, [LOCK]) and not about.is_file():
        raise RunError(f"{folder} was not written by this recipe: choose another output.")
    with claim_folder(folder):
        # more tokens are more parts, and none of them another
        record = json.dumps(asdict(settings) | {"tokens": None}, indent=1)
        if about.exists() and about.read_text() != record:
            raise RunError(f"{folder} was begun with other settings: delete it, or choose another output.")
        write_whole(about, record)
        write_parts(settings, folder, teacher, tokenizer, passages)
        shutil.rmtree(folder)


def write_parts(
    settings: OwnTextSettings,
    folder: Path,
    teacher: SpikingMambaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    passages: datasets.Dataset,
) -> None:
    """Write what is missing of the parts, and the file of them all."""
    parts = -(-settings.tokens // (settings.batch_size * settings.length))
    paths = [folder / f"{part:06d}.jsonl" for part in range(parts)]
    with interruptible(
        lambda: f"{folder} keeps {sum(map(Path.is_file, paths))} of {parts} parts; the same command goes on."
    ):
        for part, path in enumerate(tqdm(paths, desc="Writing", unit="part", disable=None)):
            if not path.is_file():
                write_whole(path, write_part(settings, part, teacher, tokenizer, passages))
        write_whole(Path(settings.output), "".join(path.read_text() for path in paths))


@fail_clearly()
def main() -> None:
    settings = parse_settings(OwnTextSettings, description=__doc__)
    quiet()
    write(settings)
    print(f"The text is in {settings.output}.")


if __name__ == "__main__":
    main()
