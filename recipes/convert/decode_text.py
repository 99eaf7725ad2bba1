"""Own text and held-out passages as JSON lines, for recipes that take text instead of tokens.

python recipes/convert/decode_text.py recipes/convert/decode_text.yaml
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from tokens import END, PASSAGES, passage_rows, read_tokens
from tqdm import tqdm

from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.files import refuse_file, write_whole
from spiking_mamba.common.progress import quiet
from spiking_mamba.common.schema import Count, Name, Names, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.model.source import load_source_tokenizer

_AT_ONCE = 1000  # documents


@schema
class DecodeSettings:
    """Every field is a key of the YAML file.

    Attributes:
        source: the Transformer whose tokens they are, see ``source.load_source``.
        own_text: files of tokens that ``write_text.py`` has written.
        data: folder that ``prepare.py`` has written.
        output: folder for ``train.jsonl``, own text, a document a line, and ``held_out.jsonl``, passages in
            rows.
        documents: so many of the own text, the first; null: all.
    """

    source: Name
    own_text: Annotated[Names, Field(min_length=1)]
    data: Name
    output: Name
    documents: Count | None = None


def documents(tokens: np.ndarray) -> list[np.ndarray]:
    """What stands between ends of text."""
    ends = np.flatnonzero(tokens == END)
    parts = np.split(tokens, ends)
    return [part[part != END] for part in parts if (part != END).any()]


def passages(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Rows of every kind of passage with its name, without the end of text in front."""
    with np.load(path) as kept:
        for kind in PASSAGES:
            for row in passage_rows(kept, kind):
                yield kind.removesuffix("-passages"), row[1:].numpy()


def lines(tokenizer: Any, texts: list[tuple[str, np.ndarray]]) -> str:
    """JSON lines with the fields that ``spiking_mamba.data`` reads."""
    made = []
    with tqdm(total=len(texts), unit=" documents", unit_scale=True) as bar:
        for first in range(0, len(texts), _AT_ONCE):
            batch = texts[first : first + _AT_ONCE]
            decoded = tokenizer.batch_decode([ids.tolist() for _, ids in batch])
            made += [
                json.dumps({"text": text, "source": name})
                for (name, _), text in zip(batch, decoded, strict=True)
            ]
            bar.update(len(batch))
    return "\n".join(made) + "\n"


@fail_clearly()
def main() -> None:
    settings = parse_settings(DecodeSettings, description=__doc__)
    quiet()
    folder = Path(settings.output)
    refuse_file(folder)
    own = [("own", part) for part in documents(read_tokens(settings.own_text))[: settings.documents]]
    held_out = list(passages(Path(settings.data, "evaluated.npz")))
    tokenizer = load_source_tokenizer(settings.source)
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in (("held_out", held_out), ("train", own)):
        write_whole(folder / f"{name}.jsonl", lines(tokenizer, texts))
        print(f"{folder / name}.jsonl: {len(texts):,} documents, {sum(len(t) for _, t in texts):,} tokens")


if __name__ == "__main__":
    main()
