"""Pages that live elsewhere in the repository, and links between its files, as they are on the site."""

import os
import posixpath
import re
from pathlib import Path

COPIES = "files/"  # folder of the site, for files of the repository that pages link to

_FENCE = re.compile(r"^ *(```|~~~)")
# code in a line comes first, so that no link is seen in it; then a link or picture with its target
_LINK = re.compile(r"(?P<code>`+)(?P<inside>.+?)(?P=code)|(?P<text>\]\()(?P<target>[^)\s]+)\)")


def from_elsewhere(root: Path) -> dict[str, str]:
    """Path in the repository to path in the site's sources, of every page outside ``docs``."""
    found = {f"{name}.md": f"project/{name.lower()}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")}
    for path in sorted(root.glob("recipes/*/README.md")):
        found[path.relative_to(root).as_posix()] = f"recipes/{path.parent.name}.md"
    quickstart = ("recipes/quickstart/teacher", "recipes/quickstart/student")
    for folder in (*quickstart, "weights/smollm2-mamba2", "weights/smollm2-spiking"):
        found[f"{folder}/README.md"] = f"models/{posixpath.basename(folder)}.md"
    return found


def on_the_site(
    text: str, source: str, uri: str, root: Path, elsewhere: dict[str, str], copied: set[str]
) -> str:
    """A page's Markdown with its links as they are on the site, without front matter.

    Args:
        text: the page.
        source: its path in the repository, to which its links are relative.
        uri: its path in the site's sources.
        root: the repository.
        elsewhere: see :func:`from_elsewhere`.
        copied: takes the paths of files that have to be copied for links to lead to.
    """

    def target(link: str) -> str:
        path, hash_, anchor = link.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return link
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path in elsewhere:
            path = elsewhere[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/").replace(".ipynb", ".md")
        elif (root / path).is_file():
            copied.add(path)
            path = COPIES + path
        else:
            return link  # mkdocs will say so
        return os.path.relpath(path, posixpath.dirname(uri) or ".").replace(os.sep, "/") + hash_ + anchor

    def replace(match: re.Match[str]) -> str:
        if match["code"]:
            page = elsewhere.get(match["inside"]) or re.fullmatch(r"docs/\w+\.md", match["inside"])
            # a page that is named is a link to it, but where the name is a link's text already
            named = page and not match.string[: match.start()].endswith("[")
            return f"[{match[0]}]({target(_from_root(match['inside'], source))})" if named else match[0]
        return f"{match['text']}{target(match['target'])})"

    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    lines, fenced = [], False
    for line in text.splitlines():
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            line = _LINK.sub(replace, line)
        lines.append(line)
    return "\n".join(lines) + "\n"


def _from_root(path: str, source: str) -> str:
    return posixpath.relpath(path, posixpath.dirname(source) or ".")
