"""m3quant serve: an OpenAI-compatible endpoint with the right flags, behind a guard on its KV cache."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from ..engines import DEFAULT, ENGINES, NAMES
from ..engines.device import CPU
from ..engines.drafts import Draft
from ..engines.installed import ENGINE_PYTHON
from ..errors import OptionError
from ..publish.licence_line import LicenceLine, licence_line
from ..runtime.compose import compose_file
from ..runtime.hardware import MAX_COUNT
from ..runtime.serve import Prepared, Ready, full_check, prepare, serve
from ..runtime.serve_recipe import load_serve_recipe, serving_recipe_names
from ..runtime.units import systemd_unit
from .offload_output import offload_json, offload_lines
from .options import ASK_OPTIONS, OFFLOAD_OPTIONS, ask_options, draft_options, offload_options
from .output_file import write_file

RECIPE_OPTIONS = (
    "node",
    "engine",
    "host",
    "port",
    "served_name",
    "guard",
    "shutdown_timeout",
    "start_timeout",
    "draft",
    "draft_tokens",
    *ASK_OPTIONS,
    *OFFLOAD_OPTIONS,
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@click.command("serve")
@click.argument("checkpoint")
@click.option(
    "--recipe",
    "recipe_file",
    default=None,
    metavar="FILE",
    help=f"Choices as YAML, or the name of one that ships: {', '.join(serving_recipe_names())}.",
)
@click.option(
    "--on", "node", default=None, metavar="NODE", help="1xH200, 2xH100, ..., cpu, cpu:4GiB. [what this machine has]"
)
@ask_options
@draft_options
@offload_options
@click.option("--host", default=None, help="Address to listen on. [127.0.0.1]")
@click.option("--port", type=click.IntRange(1, 65535), default=None, help="[8000]")
@click.option(
    "--served-name",
    "--served-model-name",
    "served_name",
    default=None,
    help="Model name that clients give. [the checkpoint's path]",
)
@click.option(
    "--api-key-env", default=None, metavar="NAME", help="Environment variable that holds the API key clients must send."
)
@click.option("--engine", type=click.Choice(NAMES), default=None, help=f"[{DEFAULT.name}]")
@click.option(
    "--engine-python",
    default=None,
    metavar="PYTHON",
    help="Python that has the engine. [M3QUANT_ENGINE_PYTHON, or this one]",
)
@click.option(
    "--guard/--no-guard",
    default=None,
    help=f"The KV cache guard inside the server. [on for {' and '.join(engine.name for engine in ENGINES if engine.has_guard)}]",
)
@click.option("--pin/--no-pin", default=True, help="Reuse the cache size that an earlier start measured. [on]")
@click.option(
    "--shutdown-timeout",
    type=click.IntRange(0, 3600),
    default=None,
    help="Seconds running requests get on SIGTERM. [60]",
)
@click.option(
    "--start-timeout",
    type=click.IntRange(1, MAX_COUNT),
    default=None,
    help="Seconds until the engine must be ready. [3600]",
)
@click.option(
    "--log",
    type=click.Path(path_type=Path),
    default=Path("m3quant-serve.log"),
    help="Where the engine's output is kept too. [m3quant-serve.log]",
)
@click.option("--verify", "verify_hashes", is_flag=True, help="Check every shard's sha256 first.")
@click.option("--dry-run", is_flag=True, help="Print the command and stop.")
@click.option("--write-compose", type=click.Path(path_type=Path), default=None, help="Write a compose file and stop.")
@click.option("--write-systemd", type=click.Path(path_type=Path), default=None, help="Write a systemd unit and stop.")
@click.option("--quiet", is_flag=True, help="Keep the engine's output in the log only.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: the decision, then one line when ready and one at the end."
)
def command(checkpoint: str, recipe_file: str | None, api_key_env: str | None, engine_python: str | None, pin: bool, log: Path, verify_hashes: bool,
            dry_run: bool, write_compose: Path | None, write_systemd: Path | None, quiet: bool, as_json: bool, **options: Any) -> int:  # fmt: skip
    """Serve CHECKPOINT: check it, plan the node, start the engine, compare what it measured with the plan, stay until it ends."""
    recipe = load_serve_recipe(recipe_file, {name: options[name] for name in RECIPE_OPTIONS})
    dry = bool(dry_run or write_compose or write_systemd)

    def say(line: str) -> None:
        click.echo(line, err=True)

    prepared = prepare(checkpoint, recipe, engine_python, _api_key(api_key_env, dry), api_key_env, dry, pin, say)
    licence = licence_line(prepared.subject.where, prepared.subject.family.model_type)
    if not as_json:
        say(licence.text)
    for note in prepared.launch.notes:
        say(f"note: {note}")
    if verify_hashes:
        full_check(checkpoint, say)
    if write_compose:
        write_file(write_compose, _compose(prepared, api_key_env))
        say(f"written: {write_compose}; start it with docker compose -f {write_compose} up")
    if write_systemd:
        write_file(
            write_systemd, systemd_unit(_own_command(), prepared.fit, prepared.recipe, api_key_env, _engine_variable())
        )
        say(f"written: {write_systemd}; its first line says how to install it")
    _show(prepared, licence, as_json, api_key_env)
    if dry:
        return 0
    code = serve(
        prepared, log, None if quiet or as_json else say, say, lambda ready: _ready(prepared, ready, as_json), pin
    )
    if as_json:
        click.echo(json.dumps({"event": "stopped", "exit": code}))
    return code


def _api_key(name: str | None, dry: bool) -> str | None:
    if name is None:
        return None
    if not _VARIABLE.fullmatch(name):
        # What was given is not repeated: it may be the key itself, and messages end in logs.
        raise OptionError(
            "--api-key-env was not given the name of an environment variable: give the name, not the key."
        )
    value = os.environ.get(name)
    if value:
        return value
    if dry:
        click.echo(
            f"note: {name}, which --api-key-env names, is not set here: it must be where the command runs", err=True
        )
        return ""
    raise OptionError(
        f"--api-key-env {name}: this variable is not set; export it, or leave the option out to serve without a key."
    )


def _own_command() -> list[str]:
    """This very invocation, for a unit: the options that write files and --dry-run left out."""
    kept, skip = [], False
    for part in sys.argv[1:]:
        if skip:
            skip = False
        elif part in ("--write-compose", "--write-systemd"):
            skip = True
        elif part != "--dry-run" and not part.startswith(("--write-compose=", "--write-systemd=")):
            kept.append(str(Path(part).resolve()) if Path(part).exists() and os.sep in part else part)
    return [sys.executable, "-m", "m3quant", *kept]


def _engine_variable() -> dict[str, str]:
    """The variable that says which Python has the engine, which the unit needs as this command did."""
    return {ENGINE_PYTHON: os.environ[ENGINE_PYTHON]} if os.environ.get(ENGINE_PYTHON) else {}


def _compose(prepared: Prepared, api_key_env: str | None) -> str:
    fit = prepared.fit
    image = fit.engine.image(prepared.installed.version if prepared.installed else None)
    if fit.node.gpu.name == CPU or image is None:
        able = " and ".join(engine.title for engine in ENGINES if engine.image(None))
        raise OptionError(
            f"--write-compose is for releases of {able} on GPUs: no image of a CPU build, an unreleased build or another engine is known."
        )
    launch = prepared.launch
    arguments = list(launch.arguments)
    arguments[arguments.index("--host") + 1] = (
        "0.0.0.0"  # inside the container; the port is published on the host's loopback
    )
    return compose_file(arguments, launch.env, launch.secret, fit, prepared.recipe, image, api_key_env)


def _show(prepared: Prepared, licence: LicenceLine, as_json: bool, api_key_env: str | None) -> None:
    fit, launch = prepared.fit, prepared.launch
    if as_json:
        engine = (
            {"name": prepared.installed.name, "version": prepared.installed.version} if prepared.installed else None
        )
        decision = {
            "event": "decided", "command": launch.command, "env": launch.public_env(), "node": fit.node.name, "context": fit.context, "pool_tokens": fit.pool.tokens,
            "concurrency": fit.concurrency, "kv_dtype": fit.setup.kv_dtype, "engine": engine, "kv_cache_memory_bytes": prepared.pin,
            "draft": fit.setup.draft and draft_json(fit.setup.draft), "offload": offload_json(fit), "licence": licence.to_json(),
        }  # fmt: skip
        click.echo(json.dumps(decision))
        return
    pinned = f", cache pinned to {prepared.pin:,} bytes per GPU" if prepared.pin else ""
    click.echo(
        f"{fit.model.where} ({fit.model.label}) on {fit.node.name}: context {fit.context:,}, at least {fit.pool.tokens:,} KV tokens ({fit.setup.kv_dtype}), "
        f"{fit.concurrency} request(s) of full length at once{pinned}"
    )
    for line in offload_lines(fit):
        click.echo(line)
    click.echo(launch.shown(shlex.quote, api_key_env))


def draft_json(draft: Draft) -> dict[str, Any]:
    """revision: None for a folder; licence: '' where its card states none."""
    return {
        "where": draft.where,
        "revision": draft.revision,
        "method": draft.method,
        "tokens": draft.tokens,
        "licence": draft.licence,
    }


def _ready(prepared: Prepared, ready: Ready, as_json: bool) -> None:
    log = ready.check.log if ready.check else None
    if as_json:
        lines = [line.to_json() for line in ready.check.lines] if ready.check else None
        event = {
            "event": "ready", "url": f"{ready.url}/v1", "pool_tokens": log.pool_tokens if log else None,
            "max_model_len": log.max_model_len if log else None, "compared": lines, "pinned": str(ready.pinned) if ready.pinned else None,
        }  # fmt: skip
        click.echo(json.dumps(event))
        return
    for line in ready.check.lines if ready.check else ():
        if not line.holds:
            click.echo(
                f"warning: {line.name}: {line.measured:,.2f} {line.unit}, planned {line.low:,.2f} to {line.high:,.2f} ({line.constant})"
            )
    pool = (
        f", {log.pool_tokens:,} KV tokens (planned at least {prepared.fit.pool.tokens:,})"
        if log and log.pool_tokens
        else ""
    )
    if ready.pinned:
        click.echo(f"the next start pins this cache size: {ready.pinned} (--no-pin measures again)")
    click.echo(f"ready: {ready.url}/v1, context {prepared.fit.context:,}{pool}")
