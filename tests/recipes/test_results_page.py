"""docs/results.md from results written by hand: every number traced to its record, none without one."""

import json
import re
import statistics
from pathlib import Path

import frontier
import pytest
import recorded
import results
import scipy.stats
import yaml
from measures import fingerprint
from placeholders import parse
from study import IDENTITY
from table import Table, settings_recorded

from spiking_mamba.common.records import put_record, read_records
from spiking_mamba.common.settings import parse_settings
from tests.helpers import commands

ROOT = Path(__file__).parents[2]

CONTROL = {"neuron": None, "loss": {"kl": 0.0, "cross_entropy": 1.0}}
ROWS = [
    {"name": "fine", "lever": "V_th", "threshold": 0.5, "seeds": [0, 1, 2]},
    {"name": "control", **CONTROL, "seeds": [0, 1]},
    {"name": "worse control", **CONTROL, "training.learning_rate": 0.1},
    {"name": "coarse", "lever": "D", "threshold": 1.0},
    {"name": "blown up", "threshold": 2.0},
    {"name": "never run", "threshold": 3.0, "seeds": [0, 1, 2]},
]
CLAIMS = [
    {"claim": "It saves energy.", "rows": ["fine", "coarse"], "verdict": "Reproduced at this scale."},
    {"claim": "It is good.", "rows": ["fine", "never run"], "verdict": "SHOWN TOO EARLY"},
    {"claim": "It is quick.", "verdict": "SHOWN TOO EARLY: {gain[never run]:.1f}x"},
    {"claim": "It is new.", "rows": ["fine"]},
    {"claim": "It is pretty.", "verdict": "Cannot be seen at this scale."},
]
LEVERS = [
    {"change": "fewer spikes", "row": "coarse", "against": "fine"},
    {"change": "nothing", "row": "never run", "against": "fine"},
]
FINDINGS = [
    {"text": "Fine is better than coarse by {abs perplexity[fine | coarse]:.1f} %.", "rows": ["control"]},
    {"text": "FOUND TOO EARLY", "rows": ["fine", "never run"]},
    {"text": "FOUND TOO EARLY: {gain[blown up]:.1f}x"},
]


@pytest.fixture
def settings(tmp_path):
    neuron = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 8}}
    training = {"max_steps": 10, "per_device_train_batch_size": 10}
    content = {
        "name": "small",
        "title": "A small table",
        "about": "What is in it.",
        "teacher": "none",
        "data": "none.txt",
        "held_out": "none.txt",
        "common": {"length": 100, "neuron": neuron, "training": training},
        "rows": ROWS,
        "claims": CLAIMS,
        "levers": LEVERS,
        "findings": FINDINGS,
        "results": str(tmp_path / "results"),
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return results.ResultsSettings(tables=[str(path)], page=str(tmp_path / "results.md"))


def test_the_source_s_configuration_is_a_study_of_its_own(settings, tmp_path):
    """Of another teacher: its rows are in no other table's best dense model, plan or picture."""
    content = yaml.safe_load(Path(settings.tables[0]).read_text())
    own = content | {"name": "own", "title": "The source's own", "teacher": "another", "about": "Of another."}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(own | {"claims": [], "levers": [], "findings": []}))
    put(settings, "fine", 0, 12.0, gain=2.0)
    put(settings, "control", 0, 9.0)
    settings.configuration, settings.appendix = str(path), "The appendix"
    alone = results.ResultsSettings(tables=[str(path)])
    put(alone, "fine", 0, 6.0, gain=2.0)
    put(alone, "control", 0, 3.0)
    text = page(settings)
    before, after = text.split("## The appendix")
    assert "## The source's own" in before
    assert "## A small table" in after
    assert "own.yaml" not in after  # of the plan
    over = {part: float(cells(part, "fine")[5].replace(",", "")) for part in (before, after)}
    assert over[before] == pytest.approx(100.0)  # 6 over 3
    assert over[after] == pytest.approx(100 / 3, abs=0.01)  # 12 over 9


def put(settings, name, seed, perplexity, gain=None, status="done", **others):
    table = parse_settings(Table, settings.tables)
    row = next(row for row in table.rows if row["name"] == name)
    own = settings_recorded(table.settings(row, seed))
    gains = {"fp32": gain, "fp16": gain, "int8": gain} if gain else {"fp32": 1.0}
    run = {
        "row": name,
        "seed": seed,
        "status": status,
        "settings": own,
        "tokens": 10_000,
        "train_seconds": 0.02,
        "seconds": 30.0,
        "teacher": {"perplexity": 10.0},
        "hardware": {"device": "NVIDIA H100", "gpu": "NVIDIA H100"},
        "commit": "0123456789abcdef",
        "date": "2026-11-23T10:00:00+00:00",
        "versions": {"torch": "2.11.0"},
        "held_out_tokens": 12_345,
    }
    if status == "done":
        spikes = {"mean_abs": 5.11 / gain, "nonzero_share": 0.25} if gain else {"mean_abs": None}
        run |= {"before": {"perplexity": 20.0}, "after": {"perplexity": perplexity, "gain": gains} | spikes}
    put_record(table.records, run | others, IDENTITY)


def page(settings):
    results.write(settings)
    return Path(settings.page).read_text()


def cells(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_without_runs_there_are_no_numbers(settings, tmp_path):
    text = page(settings)
    names = "; ".join(f"{row['name']} (0.0M tokens)" for row in ROWS)
    assert f"Planned, not run: {names}." in text
    assert not any(line.startswith(f"| {row['name']} ") for row in ROWS for line in text.splitlines())
    assert "SHOWN TOO EARLY" not in text
    assert "Fine is better" not in text
    assert text.count("Not yet run.") == 4
    assert "Cannot be seen at this scale." in text
    assert not (tmp_path / "frontier.png").exists()
    # 11 runs of 10,000 tokens at 500,000 a second, and 10 seconds around each
    assert re.search(r"small.yaml +\| +11 \| +0 \| +2 \| +0 \| +0.0 \|", text)


def fill(settings):
    for seed, perplexity in enumerate((10.1, 10.2, 10.3)):
        put(settings, "fine", seed, perplexity, gain=5.0)
    put(settings, "control", 0, 9.9)
    put(settings, "control", 1, 10.1)
    put(settings, "worse control", 0, 11.0)
    put(settings, "coarse", 0, 11.0, gain=9.0, date="2026-11-25T10:00:00+00:00")
    put(settings, "blown up", 0, None, status="diverged", error="NaN")


def test_the_frontier_is_what_nothing_else_dominates():
    points = [(2.0, 1.0), (3.0, 2.0), (2.5, 3.0), (4.0, 2.0), (5.0, 9.0), (5.0, 8.0), (6.0, 20.0)]
    best = frontier.non_dominated(points)
    assert best == [(2.0, 1.0), (4.0, 2.0), (5.0, 8.0), (6.0, 20.0)]
    for point in points:  # by the definition
        beaten = any(p[0] >= point[0] and p[1] <= point[1] and p != point for p in points)
        assert beaten == (point not in best)


def test_a_single_day_is_named_once(settings):
    put(settings, "fine", 0, 10.1, gain=5.0)
    assert "minutes on NVIDIA H100; 2026-11-23; torch" in page(settings)


def test_numbers_by_hand(settings, tmp_path):
    fill(settings)
    text = page(settings)
    # mean 10.2, sd 0.1, t(2) = 4.3027: half an interval is 4.3027 * 0.1 / sqrt(3) = 0.2484
    found = cells(text, "fine")
    assert found[1:5] == [
        "3 of 3",
        "0.0",
        "20.00",
        "10.200 [9.952, 10.448]".replace("[", "\\[").replace("]", "\\]"),
    ]
    # the best dense model is the teacher, with 10: no control is better
    assert found[5] == "+2.00 \\[-0.48, +4.48\\]"
    assert found[8] == "5.00"
    assert found[9:] == ["", "", "", ""]  # there is no teacher whose sizes could be priced
    coarse = cells(text, "coarse")
    assert coarse[1:6] == ["1 of 1", "0.0", "20.00", "11.000", "+10.00"]
    assert cells(text, "blown up")[1] == "0 of 1, diverged"
    assert "Planned, not run: never run (0.0M tokens)." in text
    assert "Reproduced at this scale." in text
    assert "SHOWN TOO EARLY" not in text
    # 11.0 over the mean of 10.2, and the rows' gains; the row never run has no line
    assert cells(text, "fewer spikes") == ["fewer spikes", "fine", "+7.84", "5.00 to 9.00"]
    assert "| nothing " not in text
    assert "Fine is better than coarse by 7.3 %." in text  # 10.2 over 11.0
    assert text.count("Not yet run.") == 2
    assert "Run, not yet judged." in text
    assert "FOUND TOO EARLY" not in text
    assert (
        "is met: 'fine' stands +2.00 % \\[-0.48, +4.48\\] from the teacher as it is (3 seeds), the best"
        in text
    )
    assert (
        "of all that were tried: 2 dense controls, trained further, lie +0.00 to +10.00 % from the teacher."
        in text
    )
    assert "It has a gain of 5.00x in the projections alone." in text
    assert "8 runs, 4.0 minutes on NVIDIA H100; 2026-11-23 to 2026-11-25; torch 2.11.0; 12,345" in text
    # the one row of several seeds: 0.1 of 10.2; 1.96 sqrt(2) times that
    assert "deviation of 0.98 % on average (0.98 to 0.98 %), pooled 0.98 %, so" in text
    assert "differences below 2.72 % mean nothing" in text
    assert "†" not in text
    assert not (tmp_path / "frontier.png").exists()  # nothing that it draws is known


def test_how_far_from_the_teacher_stands_beside_perplexity_where_it_is_known(settings):
    put(settings, "fine", 0, 10.1, gain=5.0)
    assert "KL to the teacher" not in page(settings)
    near = {"kl": 0.125, "top1_agreement": 0.75, "perplexity": 10.2, "gain": {"fp32": 5.0}, "mean_abs": 1.0}
    put(settings, "fine", 1, 10.2, gain=5.0, after=near)
    put(settings, "control", 0, 9.9)
    text = page(settings)
    assert cells(text, "row")[6:9] == ["KL to the teacher, nats", "same likeliest token, %", "mean abs s"]
    assert cells(text, "fine")[6:9] == ["0.125", "75.0", "1.011"]  # of the seed that has it; of both
    assert cells(text, "control")[6:8] == ["", ""]


def test_a_result_of_other_settings_does_not_count(settings):
    fill(settings)
    path = Path(settings.tables[0])
    path.write_text(path.read_text().replace("threshold: 0.5", "threshold: 0.6"))
    text = page(settings)
    assert "Planned, not run: fine (0.0M tokens); " in text
    assert cells(text, "coarse")[1] == "1 of 1"
    assert "is missed: 'coarse'" in text


def test_missed(settings):
    fill(settings)
    for seed in range(3):
        put(settings, "fine", seed, 10.35, gain=4.8)
    assert "is missed: 'fine' stands +3.50 %" in page(settings)


def test_a_better_dense_model_is_the_one_to_beat(settings):
    """Whatever its length; against a row of one seed there is no interval, against several there is."""
    fill(settings)
    put(settings, "control", 0, 9.5)
    put(settings, "control", 1, 9.7)
    text = page(settings)
    # 10.2 over 9.6; Welch: variances of the means 0.01 / 3 and 0.02 / 2, relative to the means' squares
    ours, theirs = 0.01 / 3 / 10.2**2, 0.02 / 2 / 9.6**2
    freedom = (ours + theirs) ** 2 / (ours**2 / 2 + theirs**2)
    half = 100 * 10.2 / 9.6 * scipy.stats.t.ppf(0.975, freedom) * (ours + theirs) ** 0.5
    assert cells(text, "fine")[5] == f"+6.25 \\[{6.25 - half:+.2f}, {6.25 + half:+.2f}\\]"
    assert "is missed: 'fine' stands +6.25 %" in text
    assert "from 'control' (3 seeds)" in text
    put(settings, "worse control", 0, 9.0)
    text = page(settings)
    assert cells(text, "fine")[5] == "+13.33"
    assert "from 'worse control' (3 seeds)" in text


def test_the_same_seeds_are_compared_in_pairs(settings):
    fill(settings)
    path = Path(settings.tables[0])
    content = yaml.safe_load(path.read_text())
    content["rows"][3]["seeds"] = [0, 1, 2]
    path.write_text(yaml.safe_dump(content))
    for seed, perplexity in enumerate((10.2, 10.4, 10.6)):
        put(settings, "coarse", seed, perplexity, gain=9.0)
    ratios = [100 * (a / b - 1) for a, b in zip((10.2, 10.4, 10.6), (10.1, 10.2, 10.3), strict=True)]
    mean, half = statistics.mean(ratios), 4.3027 * statistics.stdev(ratios) / 3**0.5
    change = cells(page(settings), "fewer spikes")[2]
    assert change == f"{mean:+.2f} \\[{mean - half:+.2f}, {mean + half:+.2f}\\]"


@pytest.mark.parametrize("commit", ["0123456789abcdef-dirty", None])
def test_what_no_commit_has_is_marked_wherever_it_shows(settings, commit):
    fill(settings)
    put(settings, "coarse", 0, 11.0, gain=9.0, commit=commit)
    text = page(settings)
    assert cells(text, "coarse")[0] == "coarse †"
    assert cells(text, "fine")[0] == "fine"
    assert cells(text, "fewer spikes")[:2] == ["fewer spikes †", "fine"]
    assert "Fine is better than coarse by 7.3 %. †" in text
    assert "| It saves energy." in text
    assert "Reproduced at this scale. † |" in text
    assert "Run, not yet judged. |" in text
    assert "gain of 5.00x in the projections alone.\n" in text  # it rests on others
    assert "or had none: 1 of the study's 8 runs. New results" in text
    assert f"; commits 0123456, {'unknown' if commit is None else '0123456'} †." in text


def test_a_record_that_lacks_what_is_needed_is_named(settings, tmp_path):
    fill(settings)
    path = tmp_path / "results/small.jsonl"
    record = read_records(path)[0]
    del record["commit"]
    put_record(path, record, IDENTITY)
    with pytest.raises(ValueError, match=r"small\.jsonl: fine, seed 0 has no commit"):
        results.write(settings)


def test_a_text_may_name_rows_of_another_table_on_the_page(settings, tmp_path):
    fill(settings)
    content = yaml.safe_load(Path(settings.tables[0]).read_text())
    content |= {"name": "other", "claims": [], "levers": []}
    content["findings"] = [{"text": "There it has {gain[small::coarse]:.1f}x."}]
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(content))
    settings.tables.append(str(other))
    assert "There it has 9.0x." in page(settings)
    before = Path(settings.page).read_text()
    for wrong, said in (("smal::coarse", "did you mean 'small'"), ("small::course", "did you mean 'coarse'")):
        content["findings"] = [{"text": f"{{gain[{wrong}]:.1f}}"}]
        other.write_text(yaml.safe_dump(content))
        with pytest.raises(ValueError, match=said):
            results.write(settings)
    assert Path(settings.page).read_text() == before


def test_the_page_in_the_repository_is_that_of_its_files(tmp_path):
    target = tmp_path / "results.md"
    done = commands.run(
        ROOT / "recipes/ablate/results.py", ROOT / "recipes/ablate/results.yaml", f"page={target}"
    )
    assert done.returncode == 0, done.stderr
    assert target.read_text() == (ROOT / "docs/results.md").read_text()


TABLES = [
    parse_settings(Table, [str(ROOT / path)])
    for path in yaml.safe_load((ROOT / "recipes/ablate/results.yaml").read_text())["tables"]
]


def test_no_record_names_a_place_of_a_machine():
    """Commands and settings are those that anybody could give."""
    folder = ROOT / "docs/results"
    files = [path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".log")]
    assert len(files) > 20
    place = re.compile(r"(?<![\w.$}])/(?:work|tmp|root|home|mnt|data|opt|Users)/")
    assert {path.name: found[0] for path in files if (found := place.findall(path.read_text()))} == {}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_record_is_on_the_page_and_will_not_be_run_again(table):
    records = {tuple(map(record.get, IDENTITY)): record for record in read_records(ROOT / table.records)}
    assert len(records) == len(read_records(ROOT / table.records))
    planned = {(row["name"], seed): row for row, seed in table.runs()}
    assert records.keys() <= planned.keys()
    for (name, seed), record in records.items():
        checks = sorted(table.checks_of(planned[name, seed]))
        assert record["key"] == fingerprint([record["depends"], record["settings"], checks, seed]), name
        now = settings_recorded(table.settings(planned[name, seed], seed))
        assert record["settings"] == json.loads(json.dumps(now)), name


def numbers(text):
    return {
        float(found.replace(",", "")) for found in re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*(?:e-\d)?", text)
    }


def test_numbers_typed_by_hand_are_settings():
    """What stands in a text beside its placeholders is a row's name or setting, never a result."""
    settings = numbers(json.dumps([(table.rows, table.common) for table in TABLES]))
    for table in TABLES:
        texts = [finding["text"] for finding in table.findings]
        for text in texts + [claim.get("verdict", "") for claim in table.claims]:
            typed = "".join(piece for piece in parse(text) if isinstance(piece, str))
            assert numbers(typed) <= settings | {0.0}, typed
        assert numbers(" ".join(re.findall(r"[\d.]+(?= ?%|x\b)", table.about))) <= settings, table.about


def test_energies_are_those_that_were_recorded():
    """The means of a run, priced anew, give the gain of the whole model that was recorded beside them."""
    found = 0
    for table in TABLES:
        for row in recorded.read(table):
            then_recorded = row.values("after", "gain_whole_model_fp32")
            for anew, then in zip(row.energies("whole_model"), then_recorded, strict=True):
                assert anew == pytest.approx(then, rel=1e-9)
                found += 1
            assert row.energies("with_neurons") == [pytest.approx(v) for v in with_neurons(row)]
    assert found > 100


def with_neurons(row):
    """By hand, for the teacher of 14 layers and widths 256 and 512, whose projections are 4,157,440 and
    1,835,008 weights: neurons compare and subtract D times, and multiply once where they leak."""
    spec = row.table.settings(row.row).neuron
    count = 0 if spec is None else spec["args"].get("max_spike_count", 4 if "ILIF" in spec["class"] else 1)
    weights, inputs = 4_157_440 + 1_835_008, 14 * (256 + 512)
    leak = 4.6 * inputs * (row.table.settings(row.row).membrane == "sequence")
    for run in row.done if spec else ():
        added = run["after"]["mean_abs"] * weights + inputs * count
        yield 4.6 * weights / (0.9 * added + leak)


def test_the_picture_shows_few_marks(tmp_path, drawn):
    rows = [row for table in TABLES for row in recorded.read(table)]
    assert frontier.draw(tmp_path / "frontier.png", rows)
    drawn.check()
    (figure,) = drawn.figures
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.texts]
    assert "best dense" in labels
    assert "int8 weights:" in labels
    assert len(labels) <= 8
    assert axes.get_legend() is None
    assert not figure.legends
    assert (tmp_path / "frontier.png").read_bytes() == (ROOT / "docs/frontier.png").read_bytes()
