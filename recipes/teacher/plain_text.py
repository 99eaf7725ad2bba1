"""Plain English text from what packages carry: HTML, pod, dictionaries, books.

A reader takes one file, `(path, content)`, and yields documents; a document is a list of paragraphs, each
on one line.
"""

import gzip
import html.parser
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator

Document = list[str]

_COMMON = """a an and are as at be been but by can for from had has have he her his i if in is it its may more
not of on or other our she so such than that the their them then there these they this to was we were when
which who will with would you your"""
_STOP_WORDS = frozenset(_COMMON.split())
_WORD = re.compile(r"[A-Za-z]+(?:['’][a-z]+)?")


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English rather than as code, a table or a list of names.

    Of its characters without spaces at least 80 % are letters, and of its words at least 20 % are among 58
    very common ones; it has at least 5 words, and none of the signs `{}` `();` `==` `::` `->` of code.
    """
    words = _WORD.findall(paragraph)
    if len(words) < 5 or re.search(r"[{}]|\(\);|==|::|->|\\[a-z]", paragraph):
        return False
    characters = [c for c in paragraph if not c.isspace()]
    letters = sum(map(str.isalpha, characters))
    common = sum(word.lower() in _STOP_WORDS for word in words)
    return letters >= 0.8 * len(characters) and common >= 0.2 * len(words)


def keep_prose(document: Document) -> Document:
    """The paragraphs that are prose, and the heading (at most 12 words, no full stop) right before each."""
    kept: Document = []
    heading = None
    for paragraph in document:
        if is_prose(paragraph):
            kept += [heading, paragraph] if heading else [paragraph]
            heading = None
        else:
            plain = len(paragraph.split()) <= 12 and re.fullmatch(r"[\w\s,'’“”\"?!&:()/-]+", paragraph)
            heading = paragraph if plain and re.search("[A-Za-z]{3}", paragraph) else None
    return kept


def cut(document: Document, characters: int) -> Iterator[Document]:
    """Sections of about that many characters, cut between paragraphs."""
    section: Document = []
    size = 0
    for paragraph in document:
        if section and size + len(paragraph) > characters:
            yield section
            section, size = [], 0
        section.append(paragraph)
        size += len(paragraph)
    if section:
        yield section


def one_line(text: str) -> str:
    return " ".join(text.replace("\u00ad", "").split())


class _Page(html.parser.HTMLParser):
    """Collects the text of blocks; leaves out code, tables, navigation."""

    SKIPPED = frozenset("head script style pre table nav footer header svg form button select".split())  # noqa: SIM905
    SKIPPED_CLASSES = re.compile(
        r"\b(navheader|navfooter|navigation|sphinxsidebar\w*|related|footer|header|toc|headerlink|highlight\S*|"
        r"sig|programlisting|screen|contents|index|breadcrumbs?|top|toplang|bottomlang|qv|versionmodified|"
        r"sidebar|menu|document-bottom-control|footnote-ref|footnote-reference)(?![\w-])"
    )
    BLOCKS = frozenset(
        "p div li ul ol dl dt dd h1 h2 h3 h4 h5 h6 blockquote section article body hr td br".split()  # noqa: SIM905
    )

    def __init__(self) -> None:
        super().__init__()
        self.blocks: Document = []
        self.buffer: list[str] = []
        self.skipping: str | None = None
        self.depth = 0

    def handle_starttag(self, tag, attributes):
        if self.skipping:
            self.depth += tag == self.skipping
            return
        classes = next((v or "" for k, v in attributes if k == "class"), "")
        closed = tag not in ("body", "br", "hr", "img", "input", "p", "li")  # those may have no end tag
        if tag in self.SKIPPED or (closed and self.SKIPPED_CLASSES.search(classes)):
            self.skipping, self.depth = tag, 1
        if tag in self.BLOCKS and tag != "br":
            self.flush()
        elif tag == "br":
            self.buffer.append(" ")

    def handle_startendtag(self, tag, attributes):
        if not self.skipping and tag in self.BLOCKS:
            self.buffer.append(" ")

    def handle_endtag(self, tag):
        if self.skipping:
            self.depth -= tag == self.skipping
            if not self.depth:
                self.skipping = None
        elif tag in self.BLOCKS:
            self.flush()

    def handle_data(self, data):
        if not self.skipping:
            self.buffer.append(data)

    def flush(self):
        text = one_line("".join(self.buffer)).replace("¶", "")
        self.buffer.clear()
        if text:
            self.blocks.append(text)


def read_html(path: str, content: bytes) -> Iterator[Document]:
    """One document a page: its blocks of text, without code, tables and navigation."""
    del path
    page = _Page()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    page.feed(text)
    page.close()
    page.flush()
    yield page.blocks


def _plain_pod(text: str) -> str:
    text = re.sub(r"[A-Z]<<+ (.*?) >>+", r"\1", text, flags=re.DOTALL)
    escapes = {"lt": "‹", "gt": "›", "verbar": "|", "sol": "/"}
    text = re.sub(r"E<(\w+)>", lambda m: escapes.get(m[1], ""), text)
    while True:
        plain = re.sub(r"[XZ]<[^<>]*>", "", text)
        plain = re.sub(r"L<([^<>|]*)\|[^<>]*>", r"\1", plain)
        plain = re.sub(r"[A-WY]<([^<>]*)>", r"\1", plain)
        if plain == text:
            return text.replace("‹", "<").replace("›", ">")
        text = plain


def read_pod(path: str, content: bytes) -> Iterator[Document]:
    """Perl's plain old documentation: one document a chapter (`=head1`), verbatim blocks left out."""
    del path
    document: Document = []
    for block in re.split(r"\n\s*\n", content.decode("utf-8", "replace")):
        command = re.match(r"=(\w+)\s*(.*)", block, re.DOTALL)
        if command:
            if command[1] == "head1":
                yield document
                document = []
            if command[1] in ("head1", "head2", "head3"):
                document.append(one_line(_plain_pod(command[2])))
        elif block and not block[0].isspace():
            document.append(one_line(_plain_pod(block)))
    yield document


def read_text(path: str, content: bytes) -> Iterator[Document]:
    """Paragraphs between blank lines; a `.gz` file is unpacked in memory."""
    text = (gzip.decompress(content) if path.endswith(".gz") else content).decode("utf-8", "replace")
    yield [one_line(block) for block in re.split(r"\n\s*\n", text) if block.strip()]


def _books(lines: list[str]) -> Iterator[Document]:
    """Lines of a book in chapters."""
    for chapter in re.split(r"\n(?=(?:CHAPTER|Chapter|VOLUME|Volume) [IVXLC\d]+)", "\n".join(lines)):
        yield [one_line(block.replace("_", "")) for block in re.split(r"\n\s*\n", chapter) if block.strip()]


def read_r_strings(path: str, content: bytes) -> Iterator[Document]:
    """Character vectors of an R data base (`.rdb`), each the lines of a book.

    The file is a row of objects, each 4 bytes of length and a zlib stream of R's serialisation (XDR).
    """
    del path
    while content:
        stream = zlib.decompressobj()
        data = stream.decompress(content[4:])
        content = stream.unused_data
        version = struct.unpack_from(">i", data, 2)[0]
        at = 14
        if version == 3:  # followed by the name of the native encoding
            at += 4 + struct.unpack_from(">i", data, at)[0]
        kind, count = struct.unpack_from(">ii", data, at)
        at += 8
        if kind & 255 != 16:  # no character vector
            continue
        lines = []
        for _ in range(count):
            length = max(struct.unpack_from(">i", data, at + 4)[0], 0)
            lines.append(data[at + 8 : at + 8 + length].decode("utf-8", "replace"))
            at += 8 + length
        yield from _books(lines)


def read_brown(path: str, content: bytes) -> Iterator[Document]:
    """The Brown corpus: `word/tag` tokens put back into running text."""
    del path
    lines = [line for line in content.decode("latin-1").splitlines() if line.strip()]
    document = []
    for i in range(0, len(lines), 4):  # sentences; where paragraphs ended is not known
        words = [token.rpartition("/")[0] for token in " ".join(lines[i : i + 4]).split()]
        text = " ".join(words).replace("``", "“").replace("''", "”")
        text = re.sub(r" ([,.;:?!)”])", r"\1", text)
        text = re.sub(r"([(“]) ", r"\1", text)
        text = re.sub(r"([.?!;,:])\1+", r"\1", text)
        document.append(text.replace("“", '"').replace("”", '"'))
    yield document


def read_moby_dick(path: str, content: bytes) -> Iterator[Document]:
    """One JSON file a chapter."""
    del path
    chapter = json.loads(content)
    yield [chapter["title"], *(one_line(p) for p in chapter["text"].split("\n\n"))]


def read_recipes(path: str, content: bytes) -> Iterator[Document]:
    """Cookbook pages: what is needed, then the steps."""
    del path
    for recipe in json.loads(content).values():
        needed = ", ".join(one_line(i.replace("()", "")) for i in recipe["ingredients"] or [])
        yield [recipe["title"], f"Ingredients: {needed}.", " ".join(map(one_line, recipe["steps"] or []))]


def read_factbook(path: str, content: bytes) -> Iterator[Document]:
    """The texts of a country's page that are sentences rather than figures, each after its heading."""
    del path
    document: Document = []

    def walk(value, heading):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, heading if key.strip() in ("text", "note") else key.strip())
        elif isinstance(value, str):
            for block in next(read_html("", re.sub(r"<br\s*/?>", "<p>", value).encode())):
                if is_prose(block) and len(block.split()) >= 12:
                    document.append(f"{heading}: {block}")

    walk(json.loads(content), "")
    yield document


def _dictionary(content: bytes) -> str:
    """A dictd file is a gzip file; its first entries describe the data base."""
    return gzip.decompress(content).decode("utf-8", "replace")


def read_gcide(path: str, content: bytes) -> Iterator[Document]:
    """The Collaborative International Dictionary: `headword: definitions`, without sources and etymology."""
    del path
    document: Document = []
    for entry in re.split(r"\n\n(?=\S)", _dictionary(content)):
        match = re.match(r"([^\n\\]+?) *\\[^\\]*\\", entry)
        if not match:
            continue
        text = re.sub(r"^.*(?:\n(?! {2,}\d+\.| {3}[A-Z]).*)*", "", entry[match.end() :], count=1)
        text = re.sub(r"\[[^\]]*\]|\([A-Z][a-z.]+\)|--[A-Z][\w. &']{1,30}\.?$|[{}]", "", text, flags=re.M)
        text = re.sub(r"\n\s*(?:Syn|Note):.*?(?=\n\s*\n|\Z)", "", text, flags=re.DOTALL)
        text = one_line(text)
        if len(text.split()) >= 6:
            document.append(f"{match[1]}: {text}")
        if len(document) == 40:
            yield document
            document = []
    yield document


def read_foldoc(path: str, content: bytes) -> Iterator[Document]:
    """The Free On-line Dictionary of Computing: headword, then its paragraphs; 12 entries a document."""
    del path
    document: Document = []
    entries = 0
    for entry in re.split(r"\n\n(?=\S)", _dictionary(content)):
        headword, _, text = entry.partition("\n")
        paragraphs = [
            one_line(re.sub(r"[{}]|<[a-z /,-]+>|\(http\S*\)", "", block))
            for block in re.split(r"\n\s*\n", text)
        ]
        paragraphs = [p for p in paragraphs if is_prose(p)]
        if paragraphs:
            document += [f"{headword}: {paragraphs[0]}", *paragraphs[1:]]
            entries += 1
        if entries == 12:
            yield document
            document, entries = [], 0
    yield document


def read_wordnet(path: str, content: bytes) -> Iterator[Document]:
    """Glosses of WordNet: `words: definition; "example"`; 40 synonym sets a document."""
    del path
    document: Document = []
    for line in content.decode().splitlines():
        fields, _, gloss = line.partition(" | ")
        if line.startswith(" ") or not gloss:
            continue
        parts = fields.split()
        words = [parts[4 + 2 * i].replace("_", " ") for i in range(int(parts[3], 16))]
        words = [re.sub(r"\((?:a|p|ip)\)$", "", word) for word in words]
        document.append(f"{', '.join(words)}: {one_line(gloss)}.")
        if len(document) == 40:
            yield document
            document = []
    yield document


def read_jargon(path: str, content: bytes) -> Iterator[Document]:
    """The Jargon File: `:headword: text`."""
    text = gzip.decompress(content).decode("utf-8", "replace")
    document: Document = []
    for entry in re.split(r"\n(?=:[^:\n]+:)", text):
        paragraphs = [one_line(re.sub(r"[{}]", "", b)) for b in re.split(r"\n\s*\n", entry) if b.strip()]
        document += [re.sub(r"^:([^:]+): ?:?", r"\1: ", p) for p in paragraphs]
        if len(document) > 30:
            yield document
            document = []
    yield document


READERS: dict[str, Callable[[str, bytes], Iterator[Document]]] = {
    "brown": read_brown,
    "factbook": read_factbook,
    "foldoc": read_foldoc,
    "gcide": read_gcide,
    "html": read_html,
    "jargon": read_jargon,
    "moby-dick": read_moby_dick,
    "pod": read_pod,
    "r-strings": read_r_strings,
    "recipes": read_recipes,
    "text": read_text,
    "wordnet": read_wordnet,
}
