"""What the site is made of: links turned to pages, the notebook as a page, a last look at what was built."""

import base64
import json
import sys

import pytest

from tests.helpers.commands import ROOT


@pytest.fixture(scope="module")
def parts():
    """The site's own modules, which import nothing that is not installed here."""
    sys.path.insert(0, str(ROOT / "docs/site_build"))
    try:
        import built
        import pages
        import rendering
    finally:
        sys.path.pop(0)
    return {"built": built, "pages": pages, "rendering": rendering}


def turned(parts, text, source="recipes/distill/README.md", uri="recipes/distill.md"):
    copied = set()
    elsewhere = parts["pages"].from_elsewhere(ROOT)
    return parts["pages"].on_the_site(text, source, uri, ROOT, elsewhere, copied), copied


@pytest.mark.parametrize(
    ("written", "expected", "files"),
    [
        ("[a](../../docs/results.md#plan)", "[a](../results.md#plan)", set()),
        ("[a](../teacher/README.md)", "[a](teacher.md)", set()),
        ("[a](../../README.md)", "[a](../project/readme.md)", set()),
        ("[a](tiny.yaml)", "[a](../files/recipes/distill/tiny.yaml)", {"recipes/distill/tiny.yaml"}),
        ("[a](../../docs/notebooks/student.ipynb)", "[a](../notebooks/student.md)", set()),
        ("![a](../../docs/step.png)", "![a](../step.png)", set()),
        ("[a](#b) [c](https://example.org/d.md)", "[a](#b) [c](https://example.org/d.md)", set()),
        ("[a](is/nowhere.md)", "[a](is/nowhere.md)", set()),  # mkdocs refuses it
        ("`[a](tiny.yaml)`", "`[a](tiny.yaml)`", set()),
        ("see `docs/energy.md`", "see [`docs/energy.md`](../energy.md)", set()),
        ("see [`docs/energy.md`](../../docs/energy.md)", "see [`docs/energy.md`](../energy.md)", set()),
        ("`recipes/rl/README.md`, `loss.zeros`", "[`recipes/rl/README.md`](rl.md), `loss.zeros`", set()),
        ("```text\n[a](tiny.yaml)\n```", "```text\n[a](tiny.yaml)\n```", set()),
        ("    [a](tiny.yaml)", "    [a](tiny.yaml)", set()),
        ("---\nlicense: x\n---\n# T", "# T", set()),
    ],
)
def test_links_lead_to_pages_and_to_copies(parts, written, expected, files):
    assert turned(parts, written) == (expected + "\n", files)


def test_every_readme_is_a_page(parts):
    found = parts["pages"].from_elsewhere(ROOT)
    assert len(set(found.values())) == len(found) > 14
    listed = (ROOT / "mkdocs.yml").read_text()
    assert [uri for uri in found.values() if f": {uri}\n" not in listed] == []
    assert {path.parent.name for path in ROOT.glob("recipes/*/*.yaml")} <= {
        name.split("/")[1] for name in found if name.startswith("recipes/")
    }


def test_a_notebook_as_a_page(parts):
    picture = base64.b64encode(b"PNG").decode()
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {
            "cell_type": "code",
            "metadata": {"alt": "a curve"},
            "source": ["x = 1\n", "draw(x)"],
            "outputs": [
                {"output_type": "stream", "text": ["\x1b[31mred\x1b[0m\n", "two\n"]},
                {"output_type": "display_data", "data": {"image/png": picture, "text/plain": ["<Figure>"]}},
                {"output_type": "execute_result", "data": {"text/plain": ["3"]}},
            ],
        },
    ]
    text, pictures = parts["rendering"].page(json.dumps({"cells": cells}), "a.ipynb")
    assert pictures == {"a-1.png": b"PNG"}
    head, where, *rest = text.split("\n\n")
    assert head == "# Title\ntext"
    assert "[a notebook](a.ipynb)" in where
    assert rest == [
        "```python\nx = 1\ndraw(x)\n```",
        "```text\nred\ntwo\n```",
        "![a curve](a-1.png)",
        "```text\n3\n```\n",
    ]


def test_a_last_look(parts, tmp_path):
    look = parts["built"].wrong
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(
        '<a href="sub/b.html#here">b</a>'
        '<a href="https://example.org">out</a><img src="data:x"><a href="#">^</a>'
    )
    (tmp_path / "sub/b.html").write_text(
        '<h2 id="here">h</h2><link href="../a.css"><a href="../index.html">a</a>'
    )
    (tmp_path / "a.css").write_text("a { background: url(data:x) }")
    assert look(tmp_path) == []
    (tmp_path / "a.css").write_text("@font-face { src: url('https://example.org/f.woff') }")
    (tmp_path / "sub/b.html").write_text(
        '<script src="//example.org/x.js"></script><a href="c.html">c</a><a href="../index.html#no">n</a>'
    )
    assert look(tmp_path) == [
        "index.html: no place sub/b.html#here",
        "sub/b.html: script fetches //example.org/x.js",
        "sub/b.html: no file c.html",
        "sub/b.html: no place ../index.html#no",
        "a.css: fetches https://example.org/f.woff",
    ]
