"""m3quant pull: a checkpoint from the Hub, every file compared with the sums that its publisher recorded."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..publish.pull import pull
from ..running.words import human_bytes
from .progress import BytesProgress


@click.command("pull")
@click.argument("repo", metavar="ORG/NAME[@REVISION]")
@click.argument("dst", type=click.Path(path_type=Path), required=False)
@click.option("--revision", metavar="REVISION", default=None, help="Branch, tag or commit [main].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(repo: str, dst: Path | None, revision: str | None, as_json: bool) -> None:
    """Download what a checkpoint needs into the folder DST [the Hub's cache] and verify every file.

    The same command continues a download that was stopped. Exit code 1: a file is not what the repo says it is.
    """
    with BytesProgress("pull") as progress:
        done = pull(repo, dst, revision, progress)
    if as_json:
        click.echo(json.dumps(done.to_json(), indent=2))
        return
    for name, reason in done.left_out.items():
        click.echo(f"not fetched: {name} ({reason})")
    proof = f"{done.manifest} of them against the repo's manifest" if done.manifest else "against the Hub's checksums"
    click.echo(
        f"{done.path}: {done.files} files, {human_bytes(done.bytes)}, of {done.repo}@{done.revision}, verified, {proof}"
    )
