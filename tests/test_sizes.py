"""No function and no file is longer than a person reads at a time; docstrings count."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST_FILE, LONGEST_FUNCTION = 400, 60  # lines
FILES = sorted(
    path for room in ("neurons", "spiking_mamba", "recipes") for path in (ROOT / room).rglob("*.py")
)


def test_no_file_is_too_long():
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    assert not {str(path): count for path, count in lines.items() if count > LONGEST_FILE}


def test_no_function_is_too_long():
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST_FUNCTION:
                found.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not found
