"""A hook of mkdocs: the pages at the root of the repository become pages of the site, and links between both stay whole.

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

    return re.sub(r"\]\(((?:\.\./|docs/)?\w[\w.]*\.md)(#[\w-]+)?\)", moved, text)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for name in PAGES:
        content = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, SITE_NAMES.get(name, name), content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return in_site(markdown)
