"""The HTML page: tables that fold, pictures that shrink, light, dark and paper."""

import re

import pytest

from spiking_mamba.reports.document import Glance, Heading, Picture, Table, to_markdown
from spiking_mamba.reports.figures import Panel, svg, write_png
from spiking_mamba.reports.page import to_html, write_document
from tests.helpers.pages import Page

HOSTILE = '<script>&"\ud800 #000000 1.23456'


def draw(figure):
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="black", marker="o")
    axes.set_title(HOSTILE.replace("\ud800", ""))
    axes.grid()


@pytest.fixture
def page(tmp_path):
    panels = [Panel(f"what {number} shows: {HOSTILE}", 2.0, draw) for number in range(2)]
    path = tmp_path / "a.png"
    write_png(path, panels)
    picture = Picture(path, "two panels", panels)
    rows = [["row", "1.0", ""]]
    blocks = [
        Heading("Title", 1),
        Glance({"Measured": f"this {HOSTILE}"}, picture),
        Table(["", "one", "two"], rows),
        Table(["", *(f"a model's name {i}" for i in range(5))], [["row", *["12.34 ± 0.56"] * 5]]),
        Table(["", "sha"], [["row", "a" * 64]]),
        Table(["", *map(str, range(20))], [["row", *["12.34 ± 0.56"] * 20]]),
    ]
    write_document(tmp_path, blocks)
    return Page(tmp_path / "report.html")


def test_panels_are_pictures_of_their_own(page):
    first, second = page.pictures()
    assert first.attrib["aria-label"].startswith("what 0 shows: <script>")
    assert first.attrib["viewBox"] == second.attrib["viewBox"] == "0 0 360 144"
    texts = [element.text for element in first.iter() if element.tag.endswith("text")]
    assert HOSTILE.replace("\ud800", "") in texts  # as it is: neither colour nor number is touched
    assert "script" not in page.tags
    styles = " ".join(element.attrib.get("style", "") for element in first.iter())
    assert "#000000" not in styles
    assert "currentColor" in styles
    assert "var(--line)" in styles
    assert min(page.letters()) >= 9


def test_a_panel_is_drawn_alike_each_time():
    panel = Panel("text", 2.0, draw)
    assert svg(panel, "a") == svg(panel, "a")
    assert svg(panel, "b").replace("b-", "a-") == svg(panel, "a")


def test_tables_fold_where_their_cells_do_not_fit(page):
    kinds = [
        a["class"] for tag, a in page.attributes if tag == "div" and a.get("class", "").startswith("wide")
    ]
    assert kinds == ["wide phone", "wide paper", "wide paper", "wide screen"]
    cells = [attributes for tag, attributes in page.attributes if tag == "td"]
    assert cells[:3] == [{}, {"data-of": "one"}, {"data-of": "two"}]
    assert {"class": "long", "data-of": "sha"} in cells
    for kind in ("paper", "screen"):
        assert f".{kind} td[data-of]::before {{ content: attr(data-of)" in page.source
    # a table that is too wide for its screen has a shade at its edge
    assert re.search(r"\.wide \{[^}]*overflow-x: auto;[^}]*radial-gradient[^}]*scroll", page.source)


def test_nothing_is_wider_than_a_telephone(page):
    style = re.search(r"<style>(.*?)</style>", page.source, re.S)[1]
    assert not [size for size in re.findall(r"(?<!max-)width: ([\d.]+)px", style) if float(size) > 320]
    for size in re.findall(r"min-width: ([^;]*);", style):
        assert size == "0" or "vw" in size
    for smallest in re.findall(r"minmax\((.*?),", style):
        assert smallest.startswith("min(100%")


def test_day_night_and_paper(page):
    for rule in ("color-scheme: light dark", "prefers-color-scheme: dark", "@media print", "break-inside"):
        assert rule in page.source
    assert page.source.count("{") == page.source.count("}")
    assert not re.findall(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", page.source)


def test_a_picture_is_linked_once_in_markdown(tmp_path):
    picture = Picture(tmp_path / "a.png", "all of it")
    blocks = [Heading("T", 1), Glance({"Keeps": "a_b <i>"}, picture), picture]
    assert to_markdown(blocks) == "# T\n\nKeeps: a_b \\<i\\>\n\n![all of it](a.png)\n"


def test_a_first_screen_without_a_picture():
    assert "<svg" not in to_html([Heading("T", 1), Glance({"Keeps": "nothing"}, None)])
