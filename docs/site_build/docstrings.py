"""Docstrings as Markdown: their roles and formulas are written for Sphinx, as spikingjelly's are."""

import re
import sys
from pathlib import Path

import griffe

sys.path.insert(0, str(Path(__file__).parent))
from formulas import block, inline

_MATHS = re.compile(r"^\.\. math::\n\n((?:[ \t]+.*\n|\n)+)", flags=re.MULTILINE)


class Roles(griffe.Extension):
    """Rewrites the docstring of every object."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """One object's, in place."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """``:func:`~package.name``` becomes ```name```, formulas become MathML."""
    text = _MATHS.sub(lambda m: f"\n{block(m[1])}\n\n", text + "\n")
    text = re.sub(r":math:`([^`]+)`", lambda m: inline(m[1]), text)
    return re.sub(r":\w+:`(~?)\.?([^`]+)`", lambda m: f"`{m[2].split('.')[-1] if m[1] else m[2]}`", text)
