"""What a calibrated conversion measured in its own pass, as a result like any other. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..checkpoint import Checkpoint, json_bytes
from ..schemes import NOT_ROUNDED
from .eval_record import Data, EvalRecord, Measured, Result

if TYPE_CHECKING:
    from ..planning.plan import Plan

CONVERSION = "conversion"  # the `suite` of a record that a conversion wrote of its own pass
HELDOUT_TASK = "conversion-heldout"  # the `task` of its result


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
        task=HELDOUT_TASK,
        convention=f"m3quant-heldout-{found['window_length']}",
        label=f"the conversion's own pass: {found['windows']} windows of {found['window_length']} tokens held out from calibration",
        data=Data(name=f"held out of {calibration['source']}", sha256=calibration["sha256"]),
        tokens=found["tokens"],
        metrics=measured,
        source_metrics=source,
        notes=[
            "the text resembles what was calibrated on, so these figures flatter the checkpoint",
            f"activations of the quantized model: {found.get('activations', NOT_ROUNDED)}",
        ],
    )


def output_fingerprint(checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> str:
    """What distinguishes an output of m3quant from others: headers and config.json, and its shards' hashes."""
    return sha256(checkpoint.fingerprint().encode() + json_bytes(manifest["shards"])).hexdigest()


def conversion_record(plan: Plan, output_name: str, fingerprint: str, manifest: Mapping[str, Any]) -> EvalRecord:
    """eval.json of a calibrated conversion from the numbers of its own two-stream pass, which held something out."""
    result = heldout_result(manifest)
    assert result is not None
    source, job = plan.checkpoint, manifest["job"]
    return EvalRecord(
        m3quant=__version__,
        finished=manifest["finished"],
        seconds=manifest["seconds"],
        device=job["device"],
        versions={name: job[name] for name in ("torch", "transformers")},
        checkpoint=Measured(name=output_name, fingerprint=fingerprint, stored=plan.recipe.name),
        source=Measured(name=source.name, fingerprint=source.fingerprint()),
        suite=CONVERSION,
        results=[result],
        layers=[{"layer": int(layer), "relative_error": error} for layer, error in manifest["stream_error"].items()],
        coverage=manifest["coverage"],
        notes=["measured by the conversion itself; m3quant eval measures more, on text that calibration has not seen"],
    )
