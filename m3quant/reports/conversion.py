"""The run's report: calibration.json and experts.json for programs, report.html for readers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..calibration.experts import ExpertLedger
from ..checkpoint import make_folder, write_bytes_atomic, write_json_atomic
from ..planning.plan import Plan, bits_per_weight, role_table
from .conversion_html import Report, page

FOLDER = "m3quant-report"
# Version of the layout of calibration.json and experts.json; raised when a key changes its meaning.
SCHEMA = 1


def write_report(plan: Plan, output: Path, records: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Write output/m3quant-report/{calibration.json, experts.json, report.html}; return report.html's relative path.

    records: the journal's record of every layer, in order, with "log" and "ledger". facts: calibration, heldout,
    coverage and stream_error, as the manifest has them. Each file is written whole or not at all; raises StoppedError
    for a full disk.
    """
    folder = output / FOLDER
    make_folder(folder)
    recipe = plan.recipe.model_dump()
    ledgers = [r["ledger"] for r in records if r["ledger"]]
    head = {"schema": SCHEMA, "m3quant": __version__}
    write_json_atomic(
        folder / "calibration.json", {**head, "recipe": recipe, "layers": [r["log"] for r in records], **facts}
    )
    write_json_atomic(folder / "experts.json", {**head, "layers": ledgers})
    report = Report(
        model=plan.checkpoint.name or plan.family.model_type,
        recipe=recipe,
        made=_made(plan),
        roles=role_table(plan),
        logs=[r["log"] for r in records],
        ledgers=ledgers,
        summaries=[ExpertLedger.from_json(ledger).summary() for ledger in ledgers],
        facts=facts,
    )
    write_bytes_atomic(folder / "report.html", page(report).encode())
    return f"{FOLDER}/report.html"


def _made(plan: Plan) -> list[tuple[str, str]]:
    """(label, text) of what was made from what."""
    size_in, size_out = sum(u.bytes_in for u in plan.units), plan.output_bytes
    made = f"{size_in:,} bytes of tensors to a checkpoint of {size_out:,} bytes"
    return [
        ("model", f"{plan.family.model_type}, {plan.family.num_layers} layers"),
        ("recipe", f"{plan.recipe.name}, format {plan.recipe.format}, rounding {plan.recipe.rounding}"),
        ("size", f"{made}, {bits_per_weight(plan):.3f} bits per quantized weight"),
        ("made by", f"m3quant {__version__}; calibration.json and experts.json next to this page hold every number"),
    ]
