"""What mkdocs calls while it builds the site: pages from elsewhere, the notebook, and a last look."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import built
import formulas
import pages
import rendering

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from elsewhere and the notebook's, and turn every page's links to the site's own."""
    elsewhere = pages.from_elsewhere(ROOT)
    texts = {
        file.src_uri: (f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()
    }
    texts |= {uri: (source, (ROOT / source).read_text()) for source, uri in elsewhere.items()}
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            text, pictures = rendering.page(file.content_string, Path(file.src_uri).name)
            texts[file.src_uri.replace(".ipynb", ".md")] = (f"docs/{file.src_uri}", text)
            for name, content in pictures.items():
                uri = str(Path(file.src_uri).with_name(name))
                files.append(File.generated(config, uri, content=content))
    copied: set[str] = set()
    for uri, (source, text) in texts.items():
        text = pages.on_the_site(text, source, uri, ROOT, elsewhere, copied)
        text = re.sub(r"```math\n(.*?)```", lambda m: formulas.block(m[1]), text, flags=re.DOTALL)
        if (file := files.get_file_from_path(uri)) is not None:
            file.content_string = text
        else:
            files.append(File.generated(config, uri, content=text))
    for path in sorted(copied):
        files.append(File.generated(config, pages.COPIES + path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> None:
    """A page that is alone below its tab has no list of pages beside it."""
    if page.parent is None:
        page.meta["hide"] = ["navigation"]


def on_post_build(config: Any) -> None:
    """Refuse a site with a dead link, or one that fetches something from elsewhere."""
    wrong = built.wrong(Path(config.site_dir))
    if wrong:
        raise PluginError("\n".join(wrong))
