"""m3quant verify: is every tensor present, right, and loadable by the engine."""

from __future__ import annotations

import json
import math

import click

from ..api import verify
from ..engines.probing import PROBED
from ..extras import need
from ..verify.tensor_error import worst
from ..verify.verification import Verification, sqnr_by_scheme
from .options import cache_option
from .progress import BytesProgress, opening

TITLES = " or ".join(engine.title for engine in PROBED)


@click.command("verify")
@click.argument("dst")
@click.option(
    "--source",
    default=None,
    help="The source it was made from, a folder or Hub repo: every tensor is compared with it.",
)
@click.option(
    "--engine",
    is_flag=True,
    help=f"Load it in {TITLES} and compare log-probabilities with the dequantized weights.",
)
@click.option(
    "--transformers",
    "in_transformers",
    is_flag=True,
    help="Load it in transformers with compressed-tensors and compare log-probabilities in float32; for small models.",
)
@click.option(
    "--engine-python",
    default=None,
    metavar="PATH",
    help=f"Python of the environment that holds {TITLES} [M3QUANT_ENGINE_PYTHON, or this one].",
)
@click.option(
    "--engine-timeout",
    type=click.FloatRange(min=1),
    default=3600.0,
    show_default=True,
    help=f"Seconds for {TITLES} to load and answer.",
)
@click.option(
    "--tensor-parallel-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help=f"GPUs that {TITLES} loads it on.",
)
@cache_option("If --source is on the Hub: disk space for its shards, in DST [free space].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    dst: str,
    source: str | None,
    engine: bool,
    in_transformers: bool,
    engine_python: str | None,
    engine_timeout: float,
    tensor_parallel_size: int,
    cache_disk: int | None,
    as_json: bool,
) -> None:
    """Check the converted folder or Hub repo DST (which is pulled first). Exit code 0 only if every check holds."""
    if source is not None or engine or in_transformers:
        need("convert", "m3quant verify with --source, --engine or --transformers")
    opening(f"verify {dst}" + (f" against {source}" if source else ""))
    result = verify(
        dst,
        source,
        engine=engine,
        transformers=in_transformers,
        engine_python=engine_python,
        engine_timeout_s=engine_timeout,
        tensor_parallel_size=tensor_parallel_size,
        cache_disk=cache_disk,
        progress=BytesProgress,
    )
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        print_verification(result)
    if not result.holds:
        raise SystemExit(1)


def print_verification(result: Verification) -> None:
    for check in result.checks:
        click.echo(f"{'ok  ' if not check.problems else 'FAIL'}  {check.name}: {check.looked_at}")
        for problem in check.problems[:20]:
            click.echo(f"      {problem}")
        if len(check.problems) > 20:
            click.echo(f"      and {len(check.problems) - 20} more")
    for scheme, facts in sqnr_by_scheme(result.errors).items():
        click.echo(
            f"{scheme}: {facts['tensors']} tensors, SQNR mean {facts['mean']:.1f} dB, least {facts['least']:.1f} dB"
        )
    listed = worst(result.errors)
    if listed:
        click.echo(f"the {len(listed)} tensors nearest to their scheme's floor:")
    for error in listed:
        value = f"{error.sqnr_db:.1f} dB" if math.isfinite(error.sqnr_db) else str(error.sqnr_db)
        click.echo(f"  {error.name}  {error.scheme}  {value}")
    click.echo(f"{result.output}: {'verified' if result.holds else 'NOT verified'}")
