"""Windows of a text in a checkpoint's own tokens, for tests that need real input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from m3quant.calibration.corpus import load_tokenizer
from m3quant.evaluate.perplexity import cut_windows
from m3quant.evaluate.texts import load_texts, token_ids


def text_windows(checkpoint: str | Path, data: Path, length: int, count: int) -> torch.Tensor:
    """The first `count` windows [count, length] int64 of the joined text."""
    tokenizer = load_tokenizer(checkpoint)
    texts = load_texts(str(data), tokenizer)
    windows = cut_windows(token_ids(tokenizer, texts.joined()), texts, length, count)
    assert len(windows) == count
    return torch.from_numpy(np.stack(windows))
