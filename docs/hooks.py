"""The site's build (`make docs`): pages and files of the repository that are not in docs/ become part of it.

Links are written for the repository, so that they work where it is browsed: `../comparison/README.md`. In the site a
page elsewhere in the repository (`PAGES`) is at an address of its own, and any other text file or folder that a page
links to becomes a page that shows it. So the site needs no server, no network, and no address of the repository.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "comparison/README.md": "comparison/index.md",
    "comparison/table.md": "comparison/table.md",
    "judging/table.md": "judging/table.md",
    "miniature/README.md": "miniature/index.md",
    "benchmarks/results/h200.md": "benchmarks/h200.md",
}
"""Pages outside docs/ by their path in the repository, and their paths in the site."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash", ".json": "json"}
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<link>[^)\s]+)\)")
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


def in_site(path: str) -> str:
    """The site's path of a file or folder of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith((".png", ".svg", ".csv")):
        return path
    return f"source/{path}.md"


def in_repository(path: str) -> str:
    """The path in the repository of a page of the site."""
    return {there: here for here, there in PAGES.items()}.get(path, f"docs/{path}")


def relinked(markdown: str, change: Callable[[str, str], str]) -> str:
    """A page with each link, `[text]` and address, replaced by what `change` makes of it, but for blocks of code."""
    parts, last = [], 0
    for fence in [*FENCE.finditer(markdown), None]:
        until = fence.start() if fence else len(markdown)
        parts.append(LINK.sub(lambda found: change(found["text"], found["link"]), markdown[last:until]))
        if fence:
            parts.append(fence[0])
            last = fence.end()
    return "".join(parts)


def links(markdown: str) -> list[str]:
    """The addresses of a page's links."""
    found: list[str] = []
    relinked(markdown, lambda text, link: found.append(link) or text)
    return found


def target(page: str, link: str) -> tuple[str, str]:
    """The file in the repository and the heading that a page's link leads to; no file if it leads out of it."""
    name, _, heading = link.partition("#")
    if not name or "://" in name or name.startswith("mailto:"):
        return "", heading
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), name)), heading


def shown(path: str) -> str:
    """A page that shows a text file, or names what is in a folder."""
    place, head = ROOT / path, f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n"
    if place.is_dir():
        names = sorted(
            each.name + "/" * each.is_dir() for each in place.iterdir() if not each.name.startswith(("_", "."))
        )
        return head + "\n".join(f"- `{name}`" for name in names) + "\n"
    text = place.read_text(encoding="utf-8")
    return f"{head}````{LANGUAGES.get(place.suffix, 'text')}\n{text.rstrip()}\n````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages outside docs/, and everything that a page links to."""
    pages = {page: (ROOT / page).read_text("utf-8") for page in PAGES if (ROOT / page).exists()}
    for page, text in pages.items():
        files.append(File.generated(config, PAGES[page], content=text))
    pages |= {
        f"docs/{file.src_uri}": file.content_string
        for file in files.documentation_pages()
        if file.src_uri not in PAGES.values()
    }
    linked = {target(page, link)[0] for page, text in pages.items() for link in links(text)}
    for path in sorted(linked - pages.keys() - {""}):
        if (ROOT / path).exists() and in_site(path) not in files.src_uris:
            as_it_is = in_site(path) == path
            content: str | bytes = (ROOT / path).read_bytes() if as_it_is else shown(path)
            file = File.generated(config, in_site(path), content=content)
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links for the repository into links for the site."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown

    def change(text: str, link: str) -> str:
        path, heading = target(in_repository(here), link)
        if not path:
            return f"{text}({link})"
        if re.fullmatch(r"\[[\w./-]+\.md\]", text):  # a page that is called by its file
            text = f"[{title(ROOT / path)}]"
        relative = posixpath.relpath(in_site(path), posixpath.dirname(here) or ".")
        return f"{text}({relative}{'#' if heading else ''}{heading})"

    return relinked(markdown, change)


def title(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
