"""A last look at the built site: every link leads somewhere, and nothing is fetched from elsewhere."""

import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# what a browser fetches by itself
_FETCHED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src")}


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[tuple[str, str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append((tag, name, value))


def wrong(site: Path) -> list[str]:
    """A line for everything that is amiss in a folder of HTML, CSS and their files."""
    pages = {
        path.relative_to(site).as_posix(): _Page(path.read_text()) for path in sorted(site.rglob("*.html"))
    }
    found = []
    for name, page in pages.items():
        for tag, attribute, value in page.links:
            parts = urlsplit(value)
            if parts.scheme or parts.netloc:
                if (tag, attribute) in _FETCHED and parts.scheme != "data":
                    found.append(f"{name}: {tag} fetches {value}")
                continue
            path = posixpath.normpath(posixpath.join("/", posixpath.dirname(name), unquote(parts.path)))[1:]
            path = path if parts.path else name
            if not (site / path).is_file():
                found.append(f"{name}: no file {value}")
            elif (
                parts.fragment
                and path in pages
                and unquote(parts.fragment) not in pages[path].ids | {"__top"}
            ):
                found.append(f"{name}: no place {value}")
    for path in sorted(site.rglob("*.css")):
        found += [
            f"{path.name}: fetches {url}"
            for url in re.findall(r"url\(['\"]?(https?://[^)'\"]+)", path.read_text())
        ]
    return found
