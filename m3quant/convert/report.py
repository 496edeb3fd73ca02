"""The run's report: calibration.json and experts.json for programs, report.html for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import write_json_atomic
from ..plan import Plan

FOLDER = "m3quant-report"


def write_report(plan: Plan, output: Path, records: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    folder = output / FOLDER
    folder.mkdir(exist_ok=True)
    write_json_atomic(folder / "calibration.json", {"layers": [r["log"] for r in records], **facts})
    write_json_atomic(folder / "experts.json", {"layers": [r["ledger"] for r in records if r["ledger"]]})
    return f"{FOLDER}/report.html"
