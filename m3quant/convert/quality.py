"""What a calibrated run reports at the end: held-out quality, and which experts the corpus starved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..calibration.boundary import Streams, WindowView
from ..calibration.experts import ExpertLedger
from ..calibration.head import Head, compare_heads


def heldout_quality(
    head: Head, streams: Streams, tokens: torch.Tensor, calibration_windows: int, activations: str
) -> dict[str, Any] | None:
    """Perplexity of both models and KL divergence on the windows that calibration never saw; None without such windows.

    tokens: [S, L]. Perplexity is exp of the mean negative log-likelihood over the L - 1 predicted tokens of each window;
    KL is KL(source || quantized) in nats over the whole vocabulary. activations: how the quantized stream rounded them
    (`schemes.rounded_activations`); the source's are not rounded.
    """
    total = tokens.shape[0]
    if calibration_windows >= total:
        return None
    views = [WindowView(states, calibration_windows, total) for states in (streams.source, streams.quantized)]
    result = compare_heads(head, head, views[0], views[1], tokens[calibration_windows:])
    return {
        "windows": total - calibration_windows,
        "window_length": tokens.shape[1],
        "tokens": result.kl.numel(),
        "activations": activations,
        "perplexity_source": math.exp(result.nll_source.double().mean().item()),
        "perplexity_quantized": math.exp(result.nll_quant.double().mean().item()),
        "kl_mean": result.kl.double().mean().item(),
        "kl_median": float(
            np.median(result.kl.double().cpu().numpy())
        ),  # of an even count the midpoint, which torch's is not
        "kl_max": result.kl.max().item(),
        "top1_agreement": result.agree.double().mean().item(),
    }


def coverage(ledgers: Sequence[ExpertLedger]) -> dict[str, Any] | None:
    """How well the corpus covered the experts of all layers, with one sentence for the user; None without routed experts."""
    if not ledgers:
        return None
    starved = {str(ledger.layer): ledger.starved for ledger in ledgers if ledger.starved}
    experts = sum(len(ledger.natural) for ledger in ledgers)
    count = sum(map(len, starved.values()))
    least = min(min(ledger.natural) for ledger in ledgers)
    floor = ledgers[0].floor
    sentence = f"expert coverage: every one of {experts} experts saw at least {least} tokens (floor {floor})"
    if starved:
        short = sum(len(ledger.below_floor) for ledger in ledgers)
        sentence = (
            f"expert coverage: {count} of {experts} experts saw fewer than {floor} tokens and were given the tokens with the "
            f"highest router score for them"
            + (f"; {short} are still below the floor because the corpus is shorter than it" if short else "")
            + f"; by layer: {starved}"
        )
    return {"experts": experts, "floor": floor, "least_tokens": least, "starved": starved, "sentence": sentence}
