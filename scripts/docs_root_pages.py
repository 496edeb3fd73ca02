"""A hook of mkdocs: navigation from docs/index.md, and the pages at the root of the repository as pages of the site.

In the repository the root's pages link to docs/NAME.md and those of docs/ to ../NAME.md; in the site all lie in one folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
SITE_NAMES = {"README.md": "overview.md"}  # mkdocs takes README.md and index.md for one page


def in_site(text: str) -> str:
    """`text` with its links as they are where all pages lie in one folder."""

    def moved(link: re.Match[str]) -> str:
        name = link[1].removeprefix("../").removeprefix("docs/")
        return f"]({SITE_NAMES.get(name, name)}{link[2] or ''})"

    text = text.replace("](docs/images/", "](images/")  # pictures of the root's pages
    return re.sub(r"\]\(((?:\.\./|docs/)?\w[\w.]*\.md)(#[\w-]+)?\)", moved, text)


def navigation(index: str) -> list[dict[str, Any]]:
    """Headings of the index as sections, the links in the first column of its tables as their pages."""
    sections: list[dict[str, Any]] = [{"Contents": "index.md"}]
    for heading, body in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", in_site(index), re.M | re.S):
        sections.append({heading: re.findall(r"^\| \[[^\]]*\]\(([^)#]+)\)", body, re.M)})
    return sections


def on_config(config: Any) -> Any:
    config.nav = navigation((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for name in PAGES:
        content = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, SITE_NAMES.get(name, name), content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return in_site(markdown)
