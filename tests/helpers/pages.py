"""Reads the HTML pages that reports are written to."""

import html
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The page's tags, all closed in their order, its texts, and the cells of its tables."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.attributes, self.text = [], [], [], ""
        self.tables, self.titles = [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.titles.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data.replace("\u00a0", " ")
        elif self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.titles[-1] += data

    def pictures(self):
        """Every SVG: XML by itself, as wide as its place in the page, and with nothing from elsewhere."""
        found = [ElementTree.fromstring(text) for text in re.findall(r"<svg .*?</svg>", self.source, re.S)]
        assert len(found) == self.tags.count("svg")
        names = re.findall(r'\bid="([^"]*)"', self.source)
        assert len(names) == len(set(names))
        for picture in found:
            assert not {"width", "height"} & set(picture.attrib)
            assert picture.attrib["viewBox"].split()[:3] == ["0", "0", "360"]
            assert picture.attrib["role"] == "img"
            assert picture.attrib["aria-label"]
            assert not {"style", "script", "metadata", "a"} & {e.tag.split("}")[1] for e in picture.iter()}
            for element in picture.iter():
                for key, value in element.attrib.items():
                    if key.endswith("href"):
                        assert value.startswith(("#", "data:image/png;base64,"))
                        assert value[0] != "#" or value[1:] in names
                    for used in re.findall(r"url\((.*?)\)", value):
                        assert used[1:] in names
        return found

    def letters(self):
        """The sizes of all letters in pictures, in pixels on a screen as wide as they are."""
        styles = [e.attrib.get("style", "") for p in self.pictures() for e in p.iter() if "text" in e.tag]
        return [float(size) for style in styles for size in re.findall(r"font-size: ([\d.]+)px", style)]

    def said(self):
        """The sentences of the first screen, by the word that each begins with."""
        found = re.findall(r"<p><b>(\w+):</b> (.*?)</p>", self.source)
        return {word: html.unescape(sentence) for word, sentence in found}

    def row(self, first, *more):
        """The one row that starts with these cells."""
        found = [row for table in self.tables for row in table if row[: 1 + len(more)] == [first, *more]]
        assert len(found) == 1, found
        return found[0]
