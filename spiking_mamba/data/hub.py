"""Data sets of the hub."""

from pathlib import Path

import datasets

from spiking_mamba.common.errors import DataError
from spiking_mamba.common.hub import unreachable

__all__ = ["load_hub"]


def load_hub(source: str, name: str, config: str, split: str, instead: str) -> datasets.Dataset:
    """A split of the hub's ``name`` in a configuration, "" for the only one.

    Args:
        source: what it was asked for as.
        name, config, split: of the data set.
        instead: what there is without it.

    Raises:
        DataError: it cannot be had; at once where nothing of it was fetched before and there is no network.
    """
    fetched = Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___"))
    if not fetched.exists() and unreachable():
        raise DataError(
            f"Could not load {source} from the hub: it is no file here, and there is no network. Without it, "
            f"there {instead}."
        )
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub's client raises many kinds; each is about this name or the network
        raise DataError(
            f"Could not load {source} from the hub: {error}. Without it, there {instead}."
        ) from error
