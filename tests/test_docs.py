"""What the documentation names exists: pages, headings, files, commands, options and recipes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from m3quant.cli import COMMANDS, cli
from m3quant.recipe.recipe import RELEASE_NAMES, fitted_names, recipe_names

from .support.paths import ROOT

PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")})
NOTES = sorted(
    path for folder in ("calibration", "m3quant/evaluate", "tests") for path in (ROOT / folder).rglob("README.md")
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
CALL = re.compile(rf"\bm3quant ({'|'.join(COMMANDS)})\b")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
FOLDERS = "tests|m3quant|calibration|runtime|recipes|docs|scripts"
# Options of vLLM, pip and of the programs in tests/ that the pages name on their own.
FOREIGN = {
    "--block-size", "--disable-log-stats", "--disable-shared-experts-fusion", "--enable-expert-parallel", "--kv-cache-memory-bytes", "--middleware", "--moe-backend",
    "--moe-runner-backend",
    "--override-generation-config", "--watermark",
    "--against", "--layout", "--method", "--peer-batch", "--peer-limit", "--shape", "--warm",
}  # fmt: skip


@cache
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@cache
def anchors(page: Path) -> frozenset[str]:
    """Headings as GitHub and mkdocs make anchors of them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text(page)), re.M)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings)


@cache
def options(command: str) -> frozenset[str]:
    with click.Context(cli) as context:
        found = cli.get_command(context, command)
        assert found is not None
        return frozenset(
            name for parameter in found.get_params(context) for name in (*parameter.opts, *parameter.secondary_opts)
        )


def calls_of(line: str) -> Iterator[tuple[str, str]]:
    """Each command in one line, and what follows it up to the next."""
    words = CALL.split(line)[1:]
    yield from zip(words[::2], words[1::2], strict=True)


def calls(page: str) -> Iterator[tuple[str, str]]:
    """Every command line of a page's code and what follows the command, lines that go on included."""
    for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", page)):
        yield from calls_of(span if "m3quant " in span else f"m3quant {span}")
    command, indent, goes_on = None, 0, False
    for line in page.splitlines():
        here = len(line) - len(line.lstrip())
        if here >= 4 and (found := list(calls_of(line))):
            command, indent = found[-1][0], here
            yield from found
        elif command and (goes_on or (here > indent and line.strip())):
            yield command, line
        else:
            command = None
        goes_on = line.endswith("\\")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", text(page))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.is_file() and there.is_relative_to(ROOT), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target} is no heading"


@pytest.mark.parametrize("page", [*PAGES, *NOTES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    for name in re.findall(rf"`((?:{FOLDERS})/[\w./*,{{}}-]+)", text(page)):
        start, _, rest = name.rstrip("/.,").partition("{")
        several, _, end = rest.partition("}")
        for one in several.split(","):
            if "NAME" not in name:
                assert list(ROOT.glob(start + one + end)), f"{page.name}: {start}{one}{end}"


def test_every_command_line_has_the_options_that_it_is_given() -> None:
    seen = 0
    for page in PAGES:
        for command, rest in calls(text(page)):
            words = rest.partition(" # ")[0]
            for option in OPTION.findall(words):
                assert option in options(command), f"{page.name}: m3quant {command} has no {option}"
                seen += 1
            for recipe in re.findall(r"--to ([a-z][\w.-]*)", words):
                assert recipe in (*recipe_names(), *fitted_names(), *RELEASE_NAMES), f"{page.name}: no recipe {recipe}"
    assert seen > 60


def test_every_option_that_stands_alone_is_one_of_a_command() -> None:
    known = FOREIGN.union(*map(options, COMMANDS))
    for page in PAGES:
        for option in re.findall(r"`(--[a-z][a-z-]+)[^`]*`", FENCE.sub("", text(page))):
            assert option in known, f"{page.name}: {option}"


def test_a_wrong_option_would_be_found() -> None:
    page = "text `m3quant plan X --nope`, `serve --odd` and\n\n    m3quant convert A B \\\n        --wrong\n    other --fine\n"
    assert [(command, OPTION.findall(rest)) for command, rest in calls(page)] == [
        ("plan", ["--nope"]), ("serve", ["--odd"]), ("convert", []), ("convert", ["--wrong"]),
    ]  # fmt: skip


def test_the_index_lists_every_page() -> None:
    listed = {target.partition("#")[0] for target in LINK.findall(text(ROOT / "docs" / "index.md"))}
    assert {page.name for page in ROOT.glob("docs/*.md")} - {"index.md"} <= listed
    assert {page.name for page in PAGES if page.parent == ROOT} == {
        name.removeprefix("../") for name in listed if name.startswith("../")
    }
