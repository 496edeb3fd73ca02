"""m3quant card: the model card of a finished output, and every check that publishing it would run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..artifact.output import require_output
from ..checkpoint import Checkpoint
from ..errors import OptionError
from ..publish.licence_line import licence_line
from .options import publish_options


@click.command("card")
@click.argument("out", type=click.Path(path_type=Path))
@publish_options
@click.option(
    "--repo", metavar="ORG/NAME", default=None, help="Where it will be published: commands on the card name it."
)
@click.option("--check", "checking", is_flag=True, help="Run every gate of publishing too; exit code 1 if one refuses.")
@click.option(
    "--online", is_flag=True, help="With --check: compare every carried file with the base on the Hub, by its hashes."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(out: Path, repo: str | None, checking: bool, online: bool, as_json: bool, **given: Any) -> None:
    """Write OUT/README.md from the facts in the folder OUT, with NOTICE and SHA256SUMS.

    What is not known is stated as missing on the card; with --check it is an error.
    """
    from ..publish.gates import check, make_card
    from .options import publish_asked

    if online and not checking:
        raise OptionError("--online says how to check: give --check with it.")
    require_output(out)
    asked = publish_asked(repo, given, online)
    written = make_card(out, asked)
    licence = licence_line(str(out), str(Checkpoint.open(out).config.get("model_type")))
    problems, explained = written.problems, {}
    if checking:
        findings = check(out, written, asked, lambda line: click.echo(line, err=True))
        problems, explained = findings.problems, findings.explained
    if as_json:
        facts = {
            "card": str(written.card_path),
            "base": vars(written.base) if written.base else None,
            "licence": vars(written.licence) if written.licence else None,
            "licence_line": licence.to_json(),
            "obligations": written.obligations,
            "checked": checking,
            "problems": problems,
            "explained": explained,
        }
        click.echo(json.dumps(facts, indent=2))
    else:
        click.echo(f"{written.card_path} is written")
        click.echo(licence.text)
        for line in written.obligations:
            click.echo(f"  {line}")
        for name, reason in explained.items():
            click.echo(f"  {name}: {reason}")
        for problem in problems:
            click.echo(f"{'FAIL' if checking else 'missing'}: {problem}", err=True)
        if checking and not problems:
            click.echo(f"{out} may be published")
    if checking and problems:
        raise SystemExit(1)
