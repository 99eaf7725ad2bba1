"""The tokenizer that belongs to a checkpoint; state-spaces' checkpoints come without one."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spiking_mamba.common.checkpoint_files import check_links, model_of_run
from spiking_mamba.common.errors import CheckpointError
from spiking_mamba.common.hub import unreachable
from spiking_mamba.model.converted import is_converted, read_index
from spiking_mamba.model.source import load_source_tokenizer

__all__ = ["chat_prompt", "check_vocabulary", "has_tokenizer", "load_tokenizer"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint's folder holds a tokenizer."""
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


def load_tokenizer(checkpoint: str | Path, tokenizer: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, or the one named by ``tokenizer``: a folder or a hub name.

    That of a converted model is its source's.

    Raises:
        CheckpointError: there is none.
    """
    name = str(tokenizer or checkpoint)
    if is_converted(Path(name)):
        return load_source_tokenizer(read_index(Path(name))["source"])
    # without its files transformers would make up an empty one for the type of the model
    if Path(name).is_dir() and not has_tokenizer(Path(name)):
        if where := model_of_run(Path(name)):
            raise CheckpointError(f"{name} holds no tokenizer: it is {where}.")
        raise CheckpointError(
            f"{name} holds no tokenizer (none of {', '.join(_TOKENIZER_FILES)}): name the folder or the hub "
            "name of the one that the model was trained with, tokenizer=..."
        )
    if Path(name).is_dir():
        check_links(Path(name))
    elif name.startswith(("/", "~", ".")) or name.count("/") > 1:  # no name that the hub could have
        raise CheckpointError(
            f"There is no folder {name} that a tokenizer could be loaded from; name another by tokenizer=..."
        )
    try:
        local = not Path(name).is_dir() and unreachable()
        return AutoTokenizer.from_pretrained(name, local_files_only=local)
    except Exception as error:  # a broken file or no network; readers of both raise what they please
        reason = str(error).partition("\n")[0]
        where = name if Path(name).is_dir() else f"{name}, which is no folder here"
        raise CheckpointError(
            f"No tokenizer can be loaded from {where}; name another by tokenizer=...: {reason}"
        ) from error


def chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> Any:
    """A question of a chat in the tokenizer's template, ids and mask ``[1, L]``, for ``generate(**...)``."""
    asked = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Raise a CheckpointError for a tokenizer with ids that the model does not know."""
    # the embedding's rows may be padded beyond the tokenizer's entries, not the other way round
    if (largest := max(tokenizer.get_vocab().values())) >= model.config.vocab_size:
        raise CheckpointError(
            f"The tokenizer knows the token id {largest}, outside the vocabulary of "
            f"{model.config.vocab_size}: it does not belong to the model."
        )
