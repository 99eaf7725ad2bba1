"""The folder of an evaluation: one process at a time, and nobody else's."""

import pytest

from spiking_mamba.common.claims import ClaimedError, claim_folder
from spiking_mamba.common.errors import RunError
from spiking_mamba.evaluation.settings import EvaluationSettings, claim_output


def settings(folder, **fields):
    return EvaluationSettings(models=["a"], output=str(folder), **fields)


def test_one_process_at_a_time(tmp_path):
    with (
        claim_output(settings(tmp_path / "out")) as folder,
        pytest.raises(ClaimedError),
        claim_output(settings(folder)),
    ):
        pass
    with claim_folder(folder), pytest.raises(ClaimedError), claim_output(settings(folder, overwrite=True)):
        pass
    with claim_output(settings(folder, limit=3)):
        assert [path.name for path in folder.iterdir()] == ["settings.yaml"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", "settings.yaml"])
def test_a_folder_of_somebody_else_stays(tmp_path, name, overwrite):
    (tmp_path / name).write_text("theme: dark")
    with (
        pytest.raises(RunError, match="holds no evaluation"),
        claim_output(settings(tmp_path, overwrite=overwrite)),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_half_started_evaluation_is_begun(tmp_path):
    (tmp_path / "settings.yaml.part").write_text("models:")
    with claim_output(settings(tmp_path)):
        assert (tmp_path / "settings.yaml").is_file()
