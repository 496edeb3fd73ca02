"""Perplexity of any checkpoint that m3quant reads or writes, streamed layer by layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from .calibration.corpus import load_documents, load_tokenizer, render
from .calibration.stream import Source, nll
from .checkpoint import Checkpoint
from .convert.journal import MANIFEST
from .device import pick_device
from .errors import CalibrationError
from .families import family_of
from .reading import ConvertedReader, SourceReader
from .source import check_complete
from .verify.structure import output_plan, read_manifest


def open_dense(path: str | Path) -> Source:
    """A source or an output of m3quant as dense tensors under the original names. Raises CheckpointError or VerifyError."""
    checkpoint = Checkpoint.open(path)
    if (Path(path) / MANIFEST).exists():
        plan = output_plan(checkpoint, read_manifest(Path(path)), None)
        return ConvertedReader(checkpoint, {t.name: t for t in plan.tensors}, plan.recipe.format)
    reader = SourceReader(checkpoint)
    check_complete(checkpoint, family_of(checkpoint.config, f"{path}/config.json"), reader.tensors)
    return reader


def text_windows(checkpoint: str | Path, data: Path, length: int, count: int | None) -> torch.Tensor:
    """Non-overlapping windows [S, length] of the text's tokens, documents joined by a blank line, the remainder dropped."""
    tokenizer = load_tokenizer(checkpoint)
    text = "\n\n".join(render(document, tokenizer) for document in load_documents(str(data)))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    available = ids.numel() // length
    if count is not None and available < count:
        raise CalibrationError(
            f"{data} fills {available} windows of {length} tokens, {count} were asked for: give more text."
        )
    wanted = available if count is None else count
    return ids[: wanted * length].view(wanted, length)


def perplexity(source: Source, tokens: torch.Tensor, device: str = "cpu") -> dict[str, Any]:
    """exp(mean NLL) over the L - 1 predicted tokens of every window [S, L]."""
    losses = nll(source, tokens, pick_device(device)).double()
    return {
        "perplexity": math.exp(losses.mean().item()),
        "nll_mean": losses.mean().item(),
        "tokens": losses.numel(),
        "windows": tokens.shape[0],
        "window_length": tokens.shape[1],
    }
