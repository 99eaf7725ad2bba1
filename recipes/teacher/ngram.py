"""5-gram Kneser-Ney on the teacher's corpus, in bits per byte: the baseline that a teacher must beat.

python recipes/teacher/ngram.py recipes/teacher/ngram.yaml
"""

import json
from dataclasses import field
from pathlib import Path
from typing import Annotated

import numpy as np
from kneser_ney import KneserNey
from pydantic import Field

from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.files import write_whole
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.schema import Name, Source, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.data.text import load_text
from spiking_mamba.data.tokens import count_bytes, document_stream, train_tokenizer
from spiking_mamba.model.tokenizer import load_tokenizer


@schema
class NgramSettings:
    """Keys of the YAML file.

    Attributes:
        train: text to count, as `spiking_mamba.data.load_text` takes it.
        evaluate: texts to score.
        vocab_size: of the byte-level BPE, trained on `train`.
        order: of the n-grams.
        tokenizer: folder of a trained tokenizer to use instead.
        output: JSON file for the result; '' writes none.
    """

    train: Name
    evaluate: list[Name] = field(default_factory=lambda: ["openwebtext-passages", "wikipedia-passages"])
    vocab_size: Annotated[int, Field(gt=256, le=2**20)] = 4096
    order: Annotated[int, Field(ge=1, le=20)] = 5
    tokenizer: Source = ""
    output: Source = ""


@fail_clearly()
def main() -> None:
    settings = parse_settings(NgramSettings, description=__doc__)
    quiet()
    if settings.output and not Path(settings.output).absolute().parent.is_dir():
        raise RunError(f"There is no folder for {settings.output}: make it, or choose another output.")
    text = load_text(settings.train)
    if settings.tokenizer:
        tokenizer = load_tokenizer(settings.tokenizer)
    else:
        tokenizer = train_tokenizer(text["text"], settings.vocab_size)
    tokens = document_stream(text, tokenizer)
    model = KneserNey(tokens, len(tokenizer), settings.order)
    record = {"train": settings.train, "train_tokens": len(tokens), "order": settings.order}
    for name in settings.evaluate:
        text = load_text(name)
        tokens = document_stream(text, tokenizer)
        # end-of-text counts, as in a model's loss over packed rows; the first one is given
        bits = -np.log2(model.probabilities(tokens, first=1))
        record[name] = {
            "bits_per_byte": bits.sum() / count_bytes(text),
            "perplexity": float(2 ** bits.mean()),
            "tokens": len(bits),
        }
        print(f"{name}: {record[name]['bits_per_byte']:.4f} bits per byte, {len(bits):,} tokens, "
              f"perplexity {record[name]['perplexity']:.2f}")  # fmt: skip
    if settings.output:
        write_whole(Path(settings.output), json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
