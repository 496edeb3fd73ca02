"""What a calibrated conversion measured in its own pass, as a result like any other. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .record import Data, Result


def heldout_result(manifest: Mapping[str, Any]) -> Result | None:
    """The `heldout` numbers of a manifest, under a convention of their own; None if the conversion held nothing out."""
    found = manifest.get("heldout")
    if not found:
        return None
    calibration = manifest["calibration"]
    source = {"perplexity": found["perplexity_source"]}
    measured = {
        "perplexity": found["perplexity_quantized"],
        "kl_mean": found["kl_mean"],
        "kl_median": found["kl_median"],
        "kl_max": found["kl_max"],
        "top1_agreement": found["top1_agreement"],
    }
    return Result(
        task="conversion-heldout",
        convention=f"m3quant-heldout-{found['window_length']}",
        label=f"the conversion's own pass: {found['windows']} windows of {found['window_length']} tokens held out from calibration",
        data=Data(name=f"held out of {calibration['source']}", sha256=calibration["sha256"]),
        tokens=found["tokens"],
        metrics=measured,
        source_metrics=source,
        notes=["the text resembles what was calibrated on, so these figures flatter the checkpoint"],
    )
