"""TeX as MathML, which browsers set themselves: no script, no fonts."""

import re

from latex2mathml.converter import convert


def inline(formula: str) -> str:
    """Within a line of Markdown."""
    return convert(formula)


def block(formula: str) -> str:
    """A paragraph of its own; two backslashes at the end of a line begin another, ``&`` aligns nothing."""
    lines = re.split(r"\\\\\s*\n", formula.strip())
    return "\n".join(
        f"<div>{convert(' '.join(line.replace('&', '').split()), display='block')}</div>" for line in lines
    )
