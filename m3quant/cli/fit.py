"""m3quant fit: the best bits for every layer within a number of bytes, or on a node."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import click

from ..api import fit
from ..errors import OptionError
from .fit_output import fit_json, print_fit, write_chart, write_recipe
from .options import ASK_OPTIONS, ask_options, cache_option, release_option
from .progress import BytesProgress


@click.command("fit")
@click.argument("src")
@click.option("--budget", metavar="SIZE", default=None, help="Bytes of the output, e.g. 8MB, 120GB or 118.4GiB.")
@click.option("--on", default=None, metavar="NODE", help="A node instead: 1xH200, 2xH100, ..., or 2x95.5GiB.")
@click.option(
    "--sensitivity",
    "sensitivity_file",
    type=click.Path(path_type=Path),
    default=None,
    help="File that --measure wrote for this source. Without it schemes are spread evenly over the layers.",
)
@click.option("--measure", "measured", is_flag=True, help="Measure first, and write the file that --sensitivity names.")
@click.option("--device", default="auto", show_default=True, help="With --measure: cpu, cuda, cuda:N or auto.")
@click.option(
    "--calibration",
    "corpus",
    metavar="SOURCE[=WEIGHT]",
    multiple=True,
    help="Text to measure on, as of convert [bundled].",
)
@click.option(
    "--windows",
    "--num-calibration-samples",
    "windows",
    type=click.IntRange(1),
    default=None,
    help="With --measure: calibration windows. [16]",
)
@click.option("--heldout-windows", type=click.IntRange(1), default=None, help="With --measure: held-out windows. [16]")
@click.option("--recipe-out", type=click.Path(path_type=Path), default=None, help="Write the recipe (YAML) here.")
@click.option("--chart", type=click.Path(path_type=Path), default=None, help="Draw bytes against KL into this page.")
@ask_options
@release_option
@cache_option("With --measure, if SRC is on the Hub or in an object store: disk space for its shards, e.g. 60GB.")
@click.option("--revision", default=None, help="Revision of a Hub repo.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    src: str,
    budget: str | None,
    on: str | None,
    sensitivity_file: Path | None,
    measured: bool,
    device: str,
    corpus: tuple[str, ...],
    windows: int | None,
    heldout_windows: int | None,
    recipe_out: Path | None,
    chart: Path | None,
    cache_disk: int | None,
    revision: str | None,
    as_json: bool,
    **serving: Any,
) -> None:
    """The best recipe for SRC (a folder, a Hub repo, or a config.json alone) within a budget, layer by layer.

    With --budget: of all recipes whose output has at most that many bytes. With --on: of all that leave the node room for
    --concurrency requests of --context tokens. With neither: the frontier, from the fewest bits to the most.
    "Best" is the least predicted KL divergence, from a sensitivity file; without one, bits are spread evenly.
    """
    gc.disable()  # as in `plan`: hundreds of thousands of objects that live to the end
    found = fit(
        src,
        budget=budget,
        node=on,
        serving={name: serving[name] for name in (*ASK_OPTIONS, "release") if serving[name] is not None},
        sensitivity=sensitivity_file,
        measure=measured,
        calibration=corpus,
        windows=windows,
        heldout_windows=heldout_windows,
        device=device,
        revision=revision,
        progress=BytesProgress,
        cache_disk=cache_disk,
    )
    if recipe_out is not None:
        if found.recipe is None:
            raise OptionError("--recipe-out writes the recipe of a budget: give --budget or --on with it.")
        write_recipe(recipe_out, found)
    if chart is not None:
        write_chart(chart, found)
    if as_json:
        click.echo(fit_json(found))
    else:
        print_fit(found, recipe_out)
