"""A notebook as a page: its cells in order, with what they printed and drew when it was filled."""

import base64
import json
import re
from pathlib import Path


def page(text: str, name: str) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook, and its pictures by file name.

    Args:
        text: of the ``.ipynb``, format 4.
        name: its file name.
    """
    parts, pictures = [], {}
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{Path(name).stem}-{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![{cell['metadata'].get('alt', '')}]({picture})")
            else:
                printed = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{_plain(printed)}\n```")
    where = (
        f"This page is [a notebook]({name}){{ download }}, with what it printed and drew; it runs as a test."
    )
    parts.insert(1, where)
    return "\n\n".join(parts) + "\n", pictures


def _plain(printed: str) -> str:
    """Without colours and the lines' ends that mean nothing."""
    return re.sub(r"\x1b\[[0-9;]*m", "", printed).rstrip()
