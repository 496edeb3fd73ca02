"""convert --publish: what the options mean, and what is told at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import OptionError
from .options import base_options, publish_asked

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..publish.streaming.settle import Settled
    from ..publish.streaming.wanted import Wanted

    F = TypeVar("F", bound=Callable[..., Any])


def publish_while_converting(function: F) -> F:
    """--publish and what belongs to it."""
    for option in reversed((
        click.option("--publish", "repo", metavar="ORG/NAME", default=None,
                     help="Upload finished shards to this private Hub repo while later layers are converted; at the end card, one commit, tag."),
        click.option("--drop-uploaded", is_flag=True, help="With --publish: a shard leaves the disk once the Hub states its checksum."),
        click.option("--tag", default=None, help="With --publish: tag for the published commit. [v1]"),
    )):  # fmt: skip
        function = option(function)
    return base_options(function)


def wanted_of(
    repo: str | None, drop: bool, tag: str | None, given: Mapping[str, Any], evaluated: bool
) -> Wanted | None:
    """What is to be published; None without --publish. evaluated: whether --eval was given.

    Raises OptionError or HubError for words that no conversion could make right.
    """
    if repo is None:
        extra = [*(["drop-uploaded"] if drop else []), *(["tag"] if tag else []), *(k for k, v in given.items() if v)]
        if extra:
            raise OptionError(
                f"--{extra[0].replace('_', '-')} is about an upload: give --publish ORG/NAME with it, or leave it out."
            )
        return None
    if evaluated:
        raise OptionError(
            "--eval does not go with --publish: convert and publish first, then run m3quant eval on the repo."
        )
    from ..publish.streaming.wanted import Wanted
    from ..publish.upload import DEFAULT_TAG, check_tag

    check_tag(tag or DEFAULT_TAG)
    return Wanted(repo, publish_asked(repo, dict(given), online=True), drop, tag or DEFAULT_TAG)


def print_published(dst: Path, settled: Settled) -> None:
    done = settled.published
    seen = "public" if done.public else "private: open it in its settings on the Hub once you have looked at it"
    click.echo(f"{done.url} is complete at {done.commit[:12]}, tagged {done.tag}; it is {seen}")
    if settled.dropped:
        click.echo(f"{dst} keeps everything but the shards: m3quant pull {done.repo} FOLDER brings the whole")
