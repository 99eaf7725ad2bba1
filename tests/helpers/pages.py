"""Reads the HTML pages that reports are written to."""

from html.parser import HTMLParser

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
            self.tables[-1][-1][-1] += data
        elif self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.titles[-1] += data

    def row(self, first, *more):
        """The one row that starts with these cells."""
        found = [row for table in self.tables for row in table if row[: 1 + len(more)] == [first, *more]]
        assert len(found) == 1, found
        return found[0]
