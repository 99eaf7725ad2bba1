"""Recipe settings, and the folder of a run."""

import math
import re
from dataclasses import field
from typing import Any

import pytest
import yaml

from spiking_mamba.common.errors import RunError
from spiking_mamba.common.schema import Name, Sources, schema
from spiking_mamba.common.settings import parse_settings
from spiking_mamba.training.arguments import training_arguments
from spiking_mamba.training.run import start_run


@schema
class Settings:
    output: Name
    rate: float = 0.1
    steps: int = 10
    flag: bool = False
    loss: dict[str, Any] = field(default_factory=dict)
    data: Any = None
    resume: bool = False
    overwrite: bool = False


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "settings file.yaml"
    path.write_text("output: somewhere\nloss: {kl: 1.0, deep: {a: 1, b: 2}}\n")
    return path


def parse(config, *arguments):
    return parse_settings(Settings, [str(config), *arguments])


@pytest.fixture
def refusal(config, capsys):
    """The message with which arguments are refused."""

    def refuse(*arguments, path=config):
        with pytest.raises(SystemExit) as stopped:
            parse(path, *arguments)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return refuse


def test_a_file_alone(config):
    assert parse(config) == Settings("somewhere", loss={"kl": 1.0, "deep": {"a": 1, "b": 2}})


@pytest.mark.parametrize(
    "arguments",
    [
        ("steps=7", "output=o", "rate=2"),
        ("--steps=7", "--output=o", "--rate=2"),
        ("--steps", "7", "--output", "o", "--rate", "2"),
        ("--steps", "7", "output=o", "--rate=2"),
        ("steps=7", "--output", "o", "rate=2"),
    ],
)
def test_overrides(config, arguments):
    settings = parse(config, *arguments)
    assert (settings.steps, settings.output, settings.rate) == (7, "o", 2.0)
    assert type(settings.rate) is float


def test_flags_negative_numbers_lists_and_null(config):
    settings = parse(config, "--flag", "--steps", "-3", "data=[a, b]")
    assert (settings.flag, settings.steps, settings.data) == (True, -3, ["a", "b"])
    assert parse(config, "data=null").data is None
    assert parse(config, "--flag", "steps=4").flag is True
    assert parse(config, "--flag", "false").flag is False


@pytest.mark.parametrize(
    "arguments", [("loss.kl=2e-1", "loss.deep.b=3"), ("--loss.kl", "2e-1", "--loss.deep.b=3")]
)
def test_nested_overrides_keep_the_rest(config, arguments):
    assert parse(config, *arguments).loss == {"kl": 0.2, "deep": {"a": 1, "b": 3}}


@schema
class Texts:
    prompt: str
    folder: Name = "there"
    data: Sources = "there"


@pytest.mark.parametrize(
    "text",
    ["line1\nline2", "Question: who?", "[1] a", "- a list", "5", "yes", "null", "{a: b}", "a # b", "a=b", ""],
)
def test_texts_are_taken_as_they_are_typed(text, config):
    config.write_text("folder: here")
    for given in ([f"prompt={text}"], [f"--prompt={text}"], ["--prompt", text]):
        assert parse_settings(Texts, [str(config), *given]).prompt == text


def test_home_folders(config, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config.write_text("prompt: ~/x\nfolder: ~/x y")
    found = parse_settings(Texts, [str(config), "data=[~/a, b~c, a/~/b]"])
    assert found == Texts("~/x", f"{tmp_path}/x y", [f"{tmp_path}/a", "b~c", "a/~/b"])


def test_words_that_cannot_be_read_are_not_the_files_fault(refusal, config):
    for word in ("loss={kl: 1", "rate=[1", "=3", "steps"):
        assert config.name not in refusal(word)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", "+1e-3"])
def test_a_float_without_a_point(config, text):
    """YAML 1.1 reads 1e-3 as a string; in settings it is a number, wherever it stands."""
    settings = parse(config, f"rate={text}", f"loss.kl={text}", f"data=[{text}, {{a: {text}}}]")
    assert settings.rate == settings.loss["kl"] == 1e-3
    assert settings.data == [1e-3, {"a": 1e-3}]
    config.write_text(f"output: o\nrate: {text}\nloss: {{kl: {text}}}\n")
    assert parse(config).rate == parse(config).loss["kl"] == 1e-3


def test_what_looks_like_a_number_and_is_none(config):
    settings = parse(config, "output=e3", "data=[1e, e-3, 1e-3x, '1e-3', 12]")
    assert settings.output == "e3"
    assert settings.data == ["1e", "e-3", "1e-3x", "1e-3", 12]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stepps=3",), "Unknown key 'stepps'.*did you mean 'steps'"),
        (("--ouptut", "x"), "Unknown key 'ouptut'.*did you mean 'output'"),
        (("zzz=3",), "Unknown key 'zzz'.*known are output, rate"),
        (("steps=many",), "steps must be an integer, got 'many'"),
        (("steps=1.5",), "steps must be an integer, got 1.5"),
        (("steps=true",), "steps must be an integer, got True"),
        (("rate=fast",), "rate must be a number, got 'fast'"),
        (("rate=true",), "rate must be a number, got True"),
        (("flag=1",), "flag must be true or false, got 1"),
        (("output=3",), "output must be a name, got 3"),
        (("loss=3",), "loss must be a mapping, got 3"),
        (("stray",), "Expected key=value or --key value, got 'stray'"),
        (("data=[1",), "flow sequence"),
    ],
)
def test_refused(refusal, arguments, message):
    text = refusal(*arguments)
    assert re.search(message, text), text


def test_refused_files(refusal, tmp_path):
    assert "There is no settings file" in refusal(path=tmp_path / "absent.yaml")
    assert "is a folder" in refusal(path=tmp_path)
    path = tmp_path / "other.yaml"
    for text, message in [
        ("- a\n- b\n", "no mapping"),
        ("steps: 3\n", "must set output"),
        ("", "must set output"),
        ("output: o\nstepps: 3\n", "did you mean 'steps'"),
        ("output: [\n", "expected"),
    ]:
        path.write_text(text)
        assert message in refusal(path=path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.yaml", "settings file.yaml"]


# --- the folder of a run ---


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def ran(tmp_path):
    """Settings whose folder holds a run."""
    settings = Settings(str(tmp_path / "run"), loss={"kl": 1.0})
    folder = start_run(settings, resume=False, overwrite=False)
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "weights").write_text("w")
    return settings


def test_a_fresh_run_keeps_its_settings(ran, tmp_path):
    kept = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())
    assert kept["loss"] == {"kl": 1.0}
    assert "resume" not in kept
    empty = tmp_path / "empty"
    empty.mkdir()
    assert start_run(Settings(str(empty)), False, False) == empty
    assert start_run(Settings(str(tmp_path / "a" / "b")), True, False).is_dir()  # nothing to resume yet


def test_a_folder_that_holds_another_run_is_left_alone(ran, tmp_path):
    folder = tmp_path / "run"
    before = content(folder)
    other = Settings(str(folder), rate=0.2, steps=11)
    for settings, flags, message in [
        (ran, (False, False), "already holds files"),
        (other, (False, False), "already holds files"),
        (
            other,
            (True, False),
            r"other settings of loss\.kl \(it was 1\.0\), rate \(it was 0\.1\), steps \(it was 10\)\.",
        ),
        (ran, (True, True), "exclude each other"),
    ]:
        with pytest.raises(RunError, match=message):
            start_run(settings, *flags)
        assert content(folder) == before


def test_resume_and_overwrite(ran, tmp_path):
    folder = tmp_path / "run"
    before = content(folder)
    assert start_run(ran, resume=True, overwrite=False) == folder
    assert content(folder) == before
    start_run(Settings(str(folder), steps=11), resume=False, overwrite=True)
    assert [str(name) for name in content(folder)] == ["settings.yaml"]


@pytest.mark.parametrize(
    "reads",
    [
        {"data": "{run}/model"},
        {"data": "{run}/model/config.json"},
        {"data": ["elsewhere", "{run}/checkpoint-3"]},
        {"loss": {"from": "{run}/../run/model"}},
        {"data": "{run}"},
        {"data": "{link}"},
    ],
)
def test_what_a_run_reads_is_not_overwritten(reads, ran, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(folder / "model")
    monkeypatch.chdir(tmp_path)
    for root in (folder, "run"):
        text = yaml.safe_dump(reads).replace("{run}", str(root)).replace("{link}", str(tmp_path / "link"))
        before = content(folder)
        with pytest.raises(RunError, match=r"overwrite=true would remove .*, which this run reads"):
            start_run(Settings(str(root), **yaml.safe_load(text)), resume=False, overwrite=True)
        assert content(folder) == before


def test_what_lies_beside_a_run_may_be_read(ran, tmp_path):
    folder = tmp_path / "run"
    (folder / "texts").mkdir()  # which no run writes
    start_run(Settings(str(folder), data=[str(folder / "texts"), "model"]), resume=False, overwrite=True)
    assert (folder / "texts").is_dir()


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)])
def test_a_folder_that_was_no_run_is_never_removed(flags, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError):
        start_run(Settings(str(tmp_path)), *flags)
    assert [str(name) for name in content(tmp_path)] == ["thesis.tex"]
    file = tmp_path / "thesis.tex"
    with pytest.raises(RunError):
        start_run(Settings(str(file)), *flags)
    assert file.read_text() == "years of work"


def test_training_arguments(tmp_path):
    arguments = training_arguments(
        tmp_path / "run", {"learning_rate": 1e-3, "max_steps": 5, "bf16": False}, 3
    )
    assert (arguments.learning_rate, arguments.max_steps, arguments.seed) == (1e-3, 5, 3)
    assert (arguments.adam_beta2, arguments.bf16, arguments.report_to) == (0.95, False, [])
    assert (arguments.project, arguments.run_name) == ("spiking-mamba", "run")  # in what is reported to
    named = training_arguments(tmp_path / "run", {"project": "mine", "run_name": "first"}, 0)
    assert (named.project, named.run_name) == ("mine", "first")
    with pytest.raises(ValueError, match="'learning_rat' in training; did you mean 'learning_rate'"):
        training_arguments(tmp_path / "run", {"learning_rat": 1e-3}, 0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_steps": -5}, "training.max_steps must be a positive integer, or -1"),
        ({"max_steps": 0}, "training.max_steps must be a positive integer, or -1"),
        ({"max_steps": True}, "training.max_steps must be"),
        ({"max_steps": 1.5}, "training.max_steps must be"),
        ({"learning_rate": math.inf}, "training.learning_rate must be a number above 0"),
        ({"learning_rate": "fast"}, "training.learning_rate must be a number above 0"),
        ({"per_device_train_batch_size": 0}, "training.per_device_train_batch_size must be an integer"),
        ({"warmup_steps": -1}, "training.warmup_steps must be a number of at least 0"),
        ({"bf16": 1}, "training.bf16 must be true, false or 'auto'"),
        ({"bf16": True, "fp16": True}, "training: At most one of fp16 and bf16"),
        ({"lr_scheduler_type": "cosin"}, "training.lr_scheduler_type must be 'linear', 'cosine'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "training.lr_scheduler_type=.*min_lr"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "training.lr_scheduler_type=.*unexpected keyword argument 'a'"),
        ({"optim": "adam"}, "training.optim must be 'adamw_torch'"),
        ({"optim_args": "a=1"}, "training.optim_args: adamw_torch_fused takes none"),
        ({"report_to": "nobody"}, "training.report_to=.*nobody is not supported"),
        ({"eval_strategy": "steps"}, "training.eval_strategy must be no"),
        ({"save_strategy": "best"}, "save_strategy not best"),
        ({"gradient_checkpointing_kwargs": {"a": 1}}, "Unknown key 'a' in training.gradient_check"),
        ({"seed": 1}, "Unknown key 'seed' in training"),
        ({"save_only_model": True}, "Unknown key 'save_only_model' in training"),
        ({"label_smoothing_factor": 0.1}, "Unknown key 'label_smoothing_factor' in training"),
        ({"output_dir": "x"}, "Unknown key 'output_dir' in training"),
    ],
)
def test_refused_training_arguments(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        training_arguments(tmp_path / "run", given, 0)
    assert not (tmp_path / "run").exists()
