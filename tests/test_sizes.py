"""No function and no file is longer than a person reads at a time."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_FILE, LONGEST_FUNCTION = 400, 60  # lines, docstrings with them
FILES = [path for room in ("neurons", "spiking_mamba", "recipes") for path in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_too_long(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lines = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    assert {name: count for name, count in lines.items() if count > LONGEST_FUNCTION} == {}
