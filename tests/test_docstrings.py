"""What ``Args`` lists is all that a function takes; ruff's D417 knows no "a, b: ..." on one line."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for room in ("neurons", "spiking_mamba", "recipes") for path in (ROOT / room).rglob("*.py")
)


def described(docstring: str) -> set[str]:
    """The names in the ``Args`` of a docstring; an empty set without."""
    _, _, text = docstring.partition("\nArgs:\n")
    entries = re.split(r"\n    (?=\S)", "\n" + re.split(r"\n(?=\S)", text)[0])
    names = [
        m
        for e in entries
        for m in re.findall(r"(?:^|\. )(\*{0,2}\w+(?:, \*{0,2}\w+)*): ", " ".join(e.split()))
    ]
    return {name.strip(" *") for group in names for name in group.split(",")}


def test_arguments_are_described_all_or_none():
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or not (
                names := described(ast.get_docstring(node) or "")
            ):
                continue
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            takes = {arg.arg for arg in given if arg.arg != "self"}
            rest = {arg.arg for arg in (node.args.vararg, node.args.kwarg) if arg is not None}
            if "classmethod" in [getattr(decorator, "id", "") for decorator in node.decorator_list]:
                takes.discard("cls")
            if missing := takes - names:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} lacks {sorted(missing)}")
            if stale := names - takes - rest:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has no {sorted(stale)}")
    assert not wrong, "\n".join(wrong)
