"""m3quant perplexity: how well a source or a converted checkpoint predicts a text, one layer in memory at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import CalibrationError
from .progress import local_folder


@click.command("perplexity")
@click.argument("checkpoints", nargs=-1, required=True, metavar="CKPT...")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Text to predict: .txt, .jsonl, .parquet or a folder of them.",
)
@click.option("--window-length", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens in a window.")
@click.option(
    "--windows", default=None, type=click.IntRange(min=1), help="Use only the first windows [all that the text fills]."
)
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    checkpoints: tuple[str, ...], data: Path, window_length: int, windows: int | None, device: str, as_json: bool
) -> None:
    """Perplexity of each CKPT (a source, an output of m3quant, or a Hub id of either, pulled first) on the same windows of --data.

    exp of the mean negative log-likelihood per token over non-overlapping windows, each read from an empty context; the
    first token of a window is not predicted. Quantized weights are dequantized; activations are not rounded.
    """
    from ..perplexity import open_dense, perplexity, text_windows

    folders = [str(local_folder(path)) for path in checkpoints]
    sources = [open_dense(path) for path in folders]
    tokens = text_windows(folders[0], data, window_length, windows)
    if tokens.shape[0] == 0:
        raise CalibrationError(
            f"{data} fills no window of {window_length} tokens: give more text or a shorter --window-length."
        )
    rows: list[dict[str, Any]] = [
        {"checkpoint": path, **perplexity(source, tokens, device)}
        for path, source in zip(checkpoints, sources, strict=True)
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(
            f"{row['checkpoint']}: perplexity {row['perplexity']:.4f} on {row['tokens']} tokens ({row['windows']} windows of {window_length})"
        )
