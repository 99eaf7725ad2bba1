"""The report of made-up evaluations: complete, self-contained, and sensible where parts are missing."""

import base64
import copy
import re
import warnings

import markdown_it
import pytest

from spiking_mamba.evaluation.statistics import SOURCE_TASKS
from spiking_mamba.reports.charts import accuracy_and_energy
from spiking_mamba.reports.document import Code, Heading, Paragraph, Picture, Table, to_markdown
from spiking_mamba.reports.evaluation import write_evaluation_report
from spiking_mamba.reports.figures import short
from spiking_mamba.reports.page import to_html
from tests.helpers.evaluations import evaluation_model, evaluation_results, seeds
from tests.helpers.pages import Page

SMALL = {"items": 60, "layers": 2}


def check_page(folder):
    """What holds for every report; returns the page."""
    page = Page(folder / "report.html")
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.attributes
    assert not {"script", "link", "iframe", "object", "a"} & set(page.tags)
    for _, attributes in page.attributes:
        assert not any(name.startswith("on") or name == "href" for name in attributes)
        assert "src" not in attributes
    assert not re.findall(r"url\((?!#)", page.source)
    assert "@import" not in page.source
    assert "Date" not in page.source
    assert min(page.letters(), default=9) >= 9
    assert list(page.said()) == ["Measured", "Keeps", "Costs"]
    assert page.source.index("<svg") < page.source.index("<h2>")
    for position, (tag, _) in enumerate(page.attributes):
        if tag == "table":  # folds, and scrolls sideways on its own
            assert re.fullmatch("wide (phone|paper|screen)", page.attributes[position - 1][1]["class"])
    for table in page.tables:
        assert len({len(row) for row in table}) == 1
    text = (folder / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"!\[[^\n]*\]\(([^)\s]+)\)", text)
    assert sorted(linked) == sorted(path.name for path in folder.glob("*.png"))
    assert page.tags.count("svg") >= len(linked)
    assert not list(folder.glob("*.part*"))
    assert "nan" not in page.text.split()
    assert "None" not in page.text.split()
    return page


def test_a_whole_report(tmp_path):
    results = evaluation_results(seeds(3, joules=True, **SMALL), resamples=200)
    before = copy.deepcopy(results)
    summary = write_evaluation_report(tmp_path / "new/folder", results)
    assert results == before
    page = check_page(tmp_path / "new/folder")
    models = results["models"]

    assert page.titles[0] == "Evaluation"
    for title in ("Zero-shot accuracy", "Gap to the reference", "Over seeds", "Perplexity", "Spikes"):
        assert title in page.titles
    score = models[2]["tasks"]["hellaswag"]["metrics"]["acc_norm"]
    cell = f"{100 * score['value']:.2f} ± {100 * score['stderr']:.2f}"
    row = page.row("hellaswag, acc_norm %")
    assert row[1:4] == ["yes", "60", "25.00"]
    assert row[4 + 2] == cell
    assert cell in summary
    assert page.row("hellaswag, acc %")[1:4] == ["", "60", "25.00"]
    assert page.row("average of the source's six tasks", "", "")[4] == f"{100 * models[0]['average']:.2f}"

    gap = next(g for g in results["gaps"] if (g["model"], g["task"]) == ("student-seed1", "average"))
    text = "{:.2f} ({:.2f} to {:.2f})".format(*(100 * gap[key] for key in ("gap", "low", "high")))
    assert page.row("average", "360")[3] == text
    group = results["groups"]["student"]["perplexity:wikipedia-leads"]
    text = "{mean:.2f} ± {sd:.2f} ({low:.2f} to {high:.2f}), 3 runs".format(**group)
    assert page.row("perplexity:wikipedia-leads")[1] == text
    for table in ("fp32", "int8"):
        text = "{mean:.2f} ± {sd:.2f} ({low:.2f} to {high:.2f}), 3 runs"
        cell = text.format(**results["groups"]["student"][f"gain_{table}"])
        assert page.row(f"energy gain of the projections, {table} table, times")[1] == cell
    perplexity = models[1]["perplexity"]["wikipedia-leads"]
    assert page.row("wikipedia-leads, perplexity")[3] == f"{perplexity['perplexity']:.2f}"
    assert page.row("wikipedia-leads, bits per byte")[3] == f"{perplexity['bits_per_byte']:.4f}"
    assert "likeliest" not in page.text

    energies = [row for table in page.tables for row in table if row[0] == "student-seed0, fp32"]
    assert len(energies) == 5  # projections, model; both and decoding with memory traffic
    first = models[1]["energy"]["projections"]["fp32"]
    assert energies[0][5] == f"{first['gain']:.2f}x"
    assert energies[0][1] == f"{first['dense_pj_per_token'] / 1e6:.4g} µJ"
    assert "student-seed0, int8 (hypothetical)" in page.text
    assert "fp32 (hypothetical)" not in page.text
    assert "Prefill is a pass of 1 x 2,048 tokens" in page.text
    assert page.row("joules")[1] == "812.5"
    assert page.text.index("Energy measured") > page.text.index("Operations per token")
    for known in ("0123456789abcdef", "python recipes/evaluate/evaluate.py", "2.13.0", models[0]["path"]):
        assert known in page.text
    assert page.row("fp32", "4.6")[1:] == ["4.6", "0.9", "0.3", "24.96", "4"]
    assert page.row("int8", "0.3")[1:] == ["0.3", "0.1", "0.3", "24.96", "1"]
    assert page.row("wikipedia-leads", "wikipedia-leads")[2:] == ["–", "77", f"{'wikipedia-leads':0<64}"]
    assert page.text.count("sciq: other items than the stock task's.") == 1
    assert page.row("piqa", "packages")[1:] == ["packages", "validation", "60", f"{'piqa':0<64}"]


def test_ratios_below_one_and_dearer_spikes_are_said_plainly(tmp_path):
    results = evaluation_results([evaluation_model("hot", rate=6.0, **SMALL)])
    row = results["models"][0]["energy"]["projections"]["fp32"]
    assert row["gain"] < 1
    write_evaluation_report(tmp_path, results)
    page = check_page(tmp_path)
    assert f"{row['gain']:.3f}x: costs more" in page.text
    assert "More accumulations than the dense model's MACs: hot." in page.text


@pytest.mark.parametrize(
    ("models", "absent"),
    [
        ([evaluation_model("teacher", reference=True, spiking=False, **SMALL)],
         ["Spikes", "Energy by operation counts", "Gap to the reference", "Over seeds",
          "Accuracy and energy"]),
        ([evaluation_model("lone", tasks=("sciq",), **SMALL)], ["Gap to the reference", "Over seeds"]),
        (seeds(1, **SMALL), ["Over seeds", "Energy measured on this GPU"]),
        ([evaluation_model("no-tasks", tasks=(), **SMALL)], ["Zero-shot accuracy", "Accuracy and energy"]),
    ],
    ids=["dense", "single", "one seed", "perplexity only"],
)  # fmt: skip
def test_what_an_evaluation_lacks_is_left_out(models, absent, tmp_path):
    write_evaluation_report(tmp_path, evaluation_results(models))
    page = check_page(tmp_path)
    assert not set(absent) & set(page.titles)
    assert {"Models", "Perplexity", "Provenance"} <= set(page.titles)


def test_values_that_are_not_there(tmp_path):
    """null of a single item, of an energy without any spike, of counts without a histogram."""
    results = evaluation_results(seeds(1, **SMALL), resamples=50)
    student = results["models"][1]
    student["tasks"]["piqa"]["metrics"]["acc"]["stderr"] = None
    student["tasks"]["piqa"]["chance"] = None
    student["perplexity"] = {}
    student["seed"] = None
    for row in student["spikes"]["projections"].values():
        row["histogram"] = None
    for row in student["energy"]["projections"].values():
        row |= {"gain": None, "gain_over_quantised": float("inf")}
    results["provenance"] = {}
    write_evaluation_report(tmp_path, results)
    page = check_page(tmp_path)
    assert "infinite" in page.text
    assert not (tmp_path / "accuracy_energy.png").exists()
    assert not list(tmp_path.glob("spikes-*.png"))


HOSTILE = "<script>alert(1)</script> $x_1$ |a| [l](http://e.x) `c` _u_ &lt; \n# h \ud800 ../../etc"


def test_names_are_shown_and_never_interpreted(tmp_path):
    models = seeds(2, **SMALL)
    for index, model in enumerate(models[1:]):
        model["name"] = HOSTILE + "é" * index
        model["group"] = f"_<b>$\\bad$ {model['group']}</b>"
        model["path"] = '"><img src=x onerror=alert(1)>'
        model["tasks"]["sciq"]["data"]["source"] = "</td><td>"
    results = evaluation_results(models, resamples=50)
    results["provenance"]["command"] = "evaluate ```\n</pre><script>"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_evaluation_report(tmp_path, results)
    page = check_page(tmp_path)
    shown = " ".join(HOSTILE.replace("\ud800", " ").split())
    assert shown in page.text
    assert "script" not in page.tags
    assert all("/" not in path.name and "<" not in path.name for path in tmp_path.iterdir())
    assert len(list(tmp_path.glob("layer_energy-*.png"))) == 2

    # a Markdown reader, too, sees text
    reader = markdown_it.MarkdownIt("commonmark").enable("table")
    tokens = reader.parse((tmp_path / "report.md").read_text(encoding="utf-8"))
    flat = [t for token in tokens for t in (token, *(token.children or []))]
    kinds = {token.type for token in flat}
    assert not kinds & {"html_block", "html_inline", "link_open", "em_open", "strong_open", "code_inline"}
    assert shown in {"".join(c.content for c in t.children or []) for t in tokens if t.type == "inline"}
    fences = [token.content for token in flat if token.type == "fence"]
    assert "evaluate ```\n</pre><script>\n" in fences


@pytest.mark.parametrize(("number", "layers"), [(1, 2), (3, 12), (12, 64)])
def test_labels_lie_in_the_pictures_and_do_not_overlap(number, layers, tmp_path, drawn):
    models = seeds(min(3, number), items=40, layers=layers, levels=17, channels=number == 3)
    models += [evaluation_model(f"dense-{i}", spiking=False, items=40) for i in range(number - 3)]
    for model in models[1:]:
        model["name"] = f"runs/a-long-name-of-a-folder/{model['name']}/model"
        model["group"] = model["name"] if number == 12 else model["group"]
    write_evaluation_report(tmp_path, evaluation_results(models, resamples=50))
    page = check_page(tmp_path)
    assert len(page.row("piqa, acc %")) == 4 + len(models)
    # overview, tasks, gaps, where there are three points a scatter; two of every student
    assert len(drawn.figures) == 3 + (number > 1) + 2 * min(3, number)
    drawn.check()


def test_the_legend_names_every_group_though_short_names_are_the_same(tmp_path, drawn):
    models = seeds(2, items=40)
    for index, model in enumerate(models[1:]):
        model["group"] = f"runs/{'a' * 40}{index}{'b' * 40}/model"
    assert len({short(model["group"]) for model in models}) == 2
    write_evaluation_report(tmp_path, evaluation_results(models, resamples=50))
    legend = drawn.figures[drawn.names.index("accuracy_energy.png")].subfigs[0].legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [short(m["group"]) for m in models]
    colours = [handle.get_color() for handle in legend.legend_handles]
    assert len(set(colours)) == 3


def test_a_table_without_a_point_is_not_drawn(tmp_path, drawn):
    """A user's table at which the spikes are free: no gain is a number."""
    models = seeds(3, items=40)[1:]
    for model in models:
        energy = model["energy"]
        for scope in ("projections", "model"):
            energy[scope]["free"] = energy[scope]["fp32"] | {"gain": None}
        for layer in energy["layers"]:
            layer["energy"]["free"] = layer["energy"]["fp32"] | {"spiking_pj_per_token": 0.0}
    write_evaluation_report(tmp_path, evaluation_results(models, resamples=50))
    check_page(tmp_path)
    assert len(drawn.figures[drawn.names.index("accuracy_energy.png")].axes) == 2
    assert "free table" not in drawn.text_of("accuracy_energy.png")
    assert "free table" in drawn.text_of("layer_energy-student-seed0.png")


def test_points_of_the_scatter():
    models = seeds(2, items=50)
    points, label = accuracy_and_energy(models)
    assert "six" in label
    assert [point["accuracy"] for point in points] == [100 * m["average"] for m in models]
    assert [p["projections"] for p in points] == [
        1.0, *(m["energy"]["projections"]["fp32"]["gain"] for m in models[1:])
    ]  # fmt: skip
    models[1]["average"] = None
    del models[1]["tasks"]["winogrande"]
    points, label = accuracy_and_energy(models)
    assert label == "mean accuracy of 6 tasks, %"
    tasks = (*SOURCE_TASKS[:-1], "sciq")
    found = [models[2]["tasks"][task] for task in tasks]
    mean = sum(task["metrics"][task["main"]]["value"] for task in found) / 6
    assert points[2]["accuracy"] == pytest.approx(100 * mean)
    models[2]["energy"]["model"]["fp32"]["gain"] = None  # a model that never spiked
    assert [point["name"] for point in accuracy_and_energy(models)[0]] == ["teacher", "student-seed0"]


def test_short_names():
    assert short("a" * 34) == "a" * 34
    assert len(short("runs/" + "a" * 80 + "/model")) <= 34
    assert short("runs/" + "a" * 80 + "/model").endswith("/model")
    assert not short("_hidden").startswith("_")


def test_both_forms_of_a_document(tmp_path):
    path = tmp_path / "one.png"
    path.write_bytes(b"\x89PNG")
    blocks = [
        Heading("Title", 1),
        Heading("Part"),
        Paragraph("1 < 2 & 3"),
        Code("a\n  b"),
        Table(["x", "y"], [["1", "2"]]),
        Picture(path, 'a "picture"'),
    ]
    assert to_markdown(blocks) == (
        "# Title\n\n## Part\n\n1 \\< 2 \\& 3\n\n```text\na\n  b\n```\n\n"
        '| x  |  y |\n| -- | -: |\n| 1  |  2 |\n\n![a "picture"](one.png)\n'
    )
    page = to_html(blocks)
    assert "<title>Title</title>" in page
    assert "<p>1 &lt; 2 &amp; 3</p>" in page
    assert '<td>1</td><td data-of="y">2</td>' in page
    assert '<pre tabindex="0">a\n  b</pre>' in page
    assert f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"' in page


def test_predictions_compared_with_the_reference(tmp_path):
    results = evaluation_results(seeds(3, **SMALL), resamples=200)
    compared = {"reference": "teacher", "kl": 0.1234567, "top1_agreement": 0.7849}
    for number, model in enumerate(results["models"]):
        for text in model["perplexity"].values():
            text["compared"] = None if model["reference"] else compared | {"kl": compared["kl"] + number}
    said = write_evaluation_report(tmp_path, results)
    page = check_page(tmp_path)
    cells = ["–" if m["reference"] else f"{0.1234567 + i:.4f}" for i, m in enumerate(results["models"])]
    assert len(set(cells)) == len(results["models"])
    assert page.row("wikipedia-leads, KL to the reference, nats per token")[2:] == cells
    cells = ["–" if m["reference"] else "78.5" for m in results["models"]]
    assert page.row("state-of-the-union, same likeliest token, %")[2:] == cells
    assert "same likeliest token, %" in said
    assert "still say other things" in page.text
