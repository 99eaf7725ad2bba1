"""The rule of import: every room imports from floors below its own only, and no module in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"neurons", "spiking_mamba.common"},
    {"spiking_mamba.model", "spiking_mamba.data"},
    {"spiking_mamba.spikes"},
    {"spiking_mamba.evaluation"},
    {"spiking_mamba.training", "spiking_mamba.reports"},
    {"spiking_mamba.commands"},
]
ROOMS = sorted(room for floor in FLOORS for room in floor if (ROOT / room.replace(".", "/")).is_dir())


def room_of(module: str) -> str | None:
    return next((room for room in ROOMS if module == room or module.startswith(room + ".")), None)


def imports(path: Path) -> set[str]:
    """All modules of this project that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            here = ".".join(path.relative_to(ROOT).with_suffix("").parts[: -node.level or None])
            module = ".".join(filter(None, (here if node.level else "", node.module)))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {module for module in found if module.split(".")[0] in ("neurons", "spiking_mamba")}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down(room):
    below: set[str] = set()
    for floor in FLOORS:
        if room in floor:
            break
        below |= floor
    for path in sorted((ROOT / room.replace(".", "/")).rglob("*.py")):
        modules = imports(path)
        wrong = {module for module in modules if room_of(module) not in (below | {room, None})}
        # the package itself, whose names come from above
        wrong |= {module for module in modules if room_of(module) is None} - {"neurons", "spiking_mamba"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_no_circle():
    paths = [path for room in ROOMS for path in (ROOT / room.replace(".", "/")).rglob("*.py")]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}
    left = {name: (imports(path) & names.keys()) - {name} for name, path in names.items()}
    # a package stands for its names, which come from modules within it
    left = {name: {m for m in found if not name.startswith(m + ".")} for name, found in left.items()}
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left, f"in a circle, or above one: {', '.join(sorted(left))}"
