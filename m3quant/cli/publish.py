"""m3quant publish: a finished output becomes a Hub repo that others can trust."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..artifact.output import read_manifest, require_output
from ..errors import HubError, PublishError
from ..publish.files import files_to_publish
from ..publish.upload import DEFAULT_TAG
from ..running.words import human_bytes
from .options import print_table, publish_asked, publish_options
from .progress import BytesProgress

if TYPE_CHECKING:
    from ..publish.gates import Prepared


def say(line: str) -> None:
    click.echo(line, err=True)


@click.command("publish")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME")
@publish_options
@click.option("--public", is_flag=True, help="Make the repo public once it is whole, verified and tagged.")
@click.option("--tag", default=DEFAULT_TAG, show_default=True, help="Tag for the published commit.")
@click.option("--replace", is_flag=True, help="Replace everything that main of an existing private repo holds.")
@click.option("--dry-run", is_flag=True, help="Run every gate and list what would be sent; needs no token or network.")
@click.option("--yes", is_flag=True, help="Send without asking.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    out: Path,
    repo: str,
    public: bool,
    tag: str,
    replace: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Check the converted folder OUT, state the obligations of its licence, and publish it as the Hub repo ORG/NAME.

    Nothing is visible until every file is there and verified; without --public the repo stays private. The same command
    continues an upload that was stopped.
    """
    from ..publish.card import card_kept
    from ..publish.gates import prepare
    from ..publish.remote import Remote, check_repo_id
    from ..publish.upload import Target, check_tag, upload

    check_repo_id(repo)
    check_tag(tag)
    require_output(out)
    if not dry_run:  # before the gates, which read every byte of the output
        check_answerable(yes, repo)
        Remote(repo, say).check_token()
    if dry_run:
        with card_kept(out):
            try:
                would = prepare(out, publish_asked(repo, given, online=False), say)
            except PublishError as error:
                error.facts = {"refused": str(error), **tell_refused(out, repo, as_json)}
                raise
        if as_json:
            click.echo(json.dumps(dry_run_facts(would, repo, tag, public), indent=2))
        else:
            tell(would, repo, public, err=False)
        return
    prepared = prepare(out, publish_asked(repo, given, online=True), say)
    tell(prepared, repo, public, err=as_json)
    if not yes and not click.confirm(f"Send it to {repo}?", err=True):
        raise HubError("Nothing was sent.")
    base = (prepared.base.repo, prepared.base.revision)
    with BytesProgress("publish") as progress:
        done = upload(repo, Target(prepared.files, tag, public, replace, base), progress)
    if as_json:
        click.echo(json.dumps(done.to_json() | {"obligations": prepared.obligations}, indent=2))
        return
    seen = "public" if done.public else "private: only you and your organization see it"
    click.echo(f"{done.url} is complete at {done.commit[:12]}, tagged {done.tag}; it is {seen}")
    click.echo(
        f"sent {human_bytes(done.sent)}, copied on the Hub {human_bytes(done.copied)} of {human_bytes(done.bytes)}"
    )
    for name in done.removed:
        click.echo(f"removed from main: {name}")


def tell(prepared: Prepared, repo: str, public: bool, err: bool) -> None:
    """What is about to be sent, and what the licence asks of the sender."""
    rows = [["file", "size", "sha256"]]
    rows += [[f.path_in_repo, human_bytes(f.size), f.sha256[:16]] for f in prepared.files]
    if not err:
        print_table(rows)
    for name in prepared.not_sent:
        click.echo(f"not sent: {name}", err=err)
    total = sum(f.size for f in prepared.files)
    after = "then made public" if public else "and left private"
    click.echo(f"{len(prepared.files)} files, {human_bytes(total)}, for {repo}, {after}", err=err)
    click.echo(f"Base: {prepared.base.repo} at {prepared.base.revision}. Its licence asks of you:", err=err)
    for line in prepared.obligations:
        click.echo(f"  {line}", err=err)


def tell_refused(out: Path, repo: str, as_json: bool) -> dict[str, Any]:
    """What a dry run that a gate refuses would send once the gate is satisfied: for --json, or printed."""
    files = files_to_publish(out, read_manifest(out))
    total = sum(f.size for f in files)
    if not as_json:
        print_table(
            [["file", "size", "sha256"], *([f.path_in_repo, human_bytes(f.size), f.sha256[:16]] for f in files)]
        )
        click.echo(f"{len(files)} files, {human_bytes(total)}, for {repo}: not to be sent yet")
    listed = [{"path": f.path_in_repo, "size": f.size, "sha256": f.sha256} for f in files]
    return {"repo": repo, "files": listed, "bytes": total}


def check_answerable(yes: bool, repo: str) -> None:
    """Raise HubError where the question could not be answered."""
    if not yes and not sys.stdin.isatty():
        raise HubError(f"There is no terminal to ask whether to send this to {repo}: give --yes if it is meant.")


def dry_run_facts(prepared: Prepared, repo: str, tag: str, public: bool) -> dict[str, Any]:
    return {
        "repo": repo,
        "tag": tag,
        "public": public,
        "base": {"repo": prepared.base.repo, "revision": prepared.base.revision},
        "obligations": prepared.obligations,
        "files": [{"path": f.path_in_repo, "size": f.size, "sha256": f.sha256} for f in prepared.files],
        "bytes": sum(f.size for f in prepared.files),
        "not_sent": prepared.not_sent,
    }
