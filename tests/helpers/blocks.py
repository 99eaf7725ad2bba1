"""Code blocks of Markdown pages, with what a comment above says of them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

_BLOCK = re.compile(
    r"^(?:<!-- (?P<comment>.*?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        language: python, bash, text, ...
        code: what is in it.
        comment: of an HTML comment on the line above, if any.
    """

    language: str
    code: str
    comment: str

    @property
    def runs(self) -> bool:
        """Whether a test can run it."""
        return self.language in ("python", "bash") and not self.comment.startswith("not run: ")

    @property
    def more(self) -> list[str]:
        """Arguments that make its commands short enough for a test."""
        return (
            shlex.split(self.comment.removeprefix("run with: "))
            if self.comment.startswith("run with: ")
            else []
        )

    def commands(self) -> list[list[str]]:
        """The words of each command line of a bash block."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [
            shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")
        ]


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    return [Block(m["language"], m["code"], m["comment"] or "") for m in _BLOCK.finditer(page.read_text())]


def promised(code: str) -> list[str]:
    """What the comments behind calls of print() say that is printed."""
    return re.findall(r"^ *print\(.*\)  # (.*)$", code, flags=re.MULTILINE)
