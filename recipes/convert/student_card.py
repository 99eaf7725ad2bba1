"""Put what a student scored at the head of its card, as the hub reads it.

python recipes/convert/student_card.py recipes/convert/student_card.yaml

The card's text is written by hand; its numbers are held by recipes/ablate/figures.yaml.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from model_card import BASE_MODEL, ROW, TEXTS

from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.records import read_records
from spiking_mamba.common.schema import Name, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.data.benchmarks import BENCHMARK_SETS
from spiking_mamba.reports.hub_card import Score, accuracy, card_data, write_hub_card


@schema
class StudentCardSettings:
    """Keys of the YAML file.

    Attributes:
        model: folder of the packed student; the card lies there.
        records: what ``score_student.py`` has logged.
        name: of its record.
    """

    model: Name
    records: Name
    name: Name


def head(record: Mapping[str, Any], model: str) -> ModelCardData:
    """Metadata of a card, from the record of a score."""
    scores = []
    for task, found in record["tasks"].items():
        metric = BENCHMARK_SETS[task].main
        scores.append(accuracy(task, metric, found[metric], found["stderr"], f"{found['items']} items"))
    for short, label in TEXTS.items():
        count = f"{record[f'passages_{short}']} rows of {ROW} tokens"
        scores.append(Score(label, "perplexity", record[f"perplexity_{short}"], count))
    return card_data(
        model, scores, "apache-2.0", spiking=True, library="spiking-mamba", base_model=BASE_MODEL
    )


def write(settings: StudentCardSettings) -> Path:
    """Write the head; return the card's path.

    Raises:
        RunError: there is no record of that name.
    """
    records = {record["name"]: record for record in read_records(Path(settings.records))}
    if settings.name not in records:
        raise RunError(f"{settings.records} has no {settings.name}: {', '.join(records)} were scored.")
    folder = Path(settings.model)
    write_hub_card(folder, head(records[settings.name], folder.name))
    return folder / "README.md"


@fail_clearly()
def main() -> None:
    settings = parse_settings(StudentCardSettings, description=__doc__)
    print(f"The card is {write(settings)}.")


if __name__ == "__main__":
    main()
