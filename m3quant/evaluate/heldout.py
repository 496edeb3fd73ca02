"""What a calibrated conversion measured in its own pass, as a result like any other. Torch-free."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import __version__
from .record import Data, EvalRecord, Measured, Result

if TYPE_CHECKING:
    from ..plan import Plan

CONVERSION = "conversion"  # the `suite` of a record that a conversion wrote of its own pass


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


def conversion_record(plan: Plan, output_name: str, facts: Mapping[str, Any], device: str) -> EvalRecord | None:
    """eval.json of a calibrated conversion from the numbers of its own two-stream pass; None if it held nothing out.

    facts: what the manifest tells of calibration, with "seconds" and "job".
    """
    result = heldout_result(facts)
    if result is None:
        return None
    source = plan.checkpoint
    job = facts["job"]
    return EvalRecord(
        m3quant=__version__,
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=facts["seconds"],
        device=device,
        versions={name: job[name] for name in ("torch", "transformers")},
        checkpoint=Measured(name=output_name, stored=plan.recipe.name),
        source=Measured(name=source.root.rstrip("/").rpartition("/")[2], fingerprint=source.fingerprint()),
        suite=CONVERSION,
        results=[result],
        layers=[{"layer": int(layer), "relative_error": error} for layer, error in facts["stream_error"].items()],
        coverage=facts["coverage"],
        notes=["measured by the conversion itself; m3quant eval measures more, on text that calibration has not seen"],
    )
