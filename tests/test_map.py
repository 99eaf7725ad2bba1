"""README.md's map leads to what is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_path_of_the_map_exists():
    text = re.search(r"## Map.*?```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    room, found = ROOT, []
    for line in text.splitlines():
        if not line.startswith(" "):
            room = ROOT / line.split()[0]
            found.append(room)
        elif not line.startswith("     "):
            found += [room / name for name in re.findall(r"[\w/]+(?:\.py|/)", line[:24])]
        found += [path for name in re.findall(r"\b\w+\.py\b", line[24:]) for path in [named(room, name)]]
    assert len(found) > 25
    assert [str(path) for path in found if not path.exists()] == []


def named(room, name):
    """A file that a line's text names: in the room, below it, or beside the rooms."""
    below = [*room.rglob(name), *(ROOT / "tests").glob(name)]
    return below[0] if below else room / name
