"""Checkpoints in the real vLLM on a GPU against reference log-probs: one table.

    python tests/support/engine/gpu_check.py --reference REFERENCE.json [--jobs 4] [--output RESULTS.json] FOLDER...

REFERENCE.json (made by reference.py) holds the prompts and, per folder name, log-probs and most likely ids. Each checkpoint runs on the
engine's default MoE backend. One with INT4 experts runs on `emulation` too, which multiplies dequantized weights and so
distinguishes a wrong checkpoint from an inexact kernel: a difference that only the default shows is the kernel's.

The engine is this Python's own vLLM, or that of M3QUANT_ENGINE_PYTHON. Exit code 1 if a checkpoint did not load whole.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from m3quant.engines import DEFAULT
from m3quant.engines.probing import EngineReport, difference, run_probe
from m3quant.errors import M3QuantError

ENV = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
KV_BYTES = 1 << 30  # a fixed cache: engines that share a GPU cannot measure each other's free memory


def has_int4_experts(folder: Path) -> bool:
    """Whether the routed experts are integers of 4 bits, from config.json and the shards' headers."""
    config = json.loads((folder / "config.json").read_text())
    columns = (config.get("text_config") or config)["hidden_size"]
    for shard in folder.glob("*.safetensors"):
        with shard.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name.endswith(".w1.qweight"):  # AutoAWQ has no other width
                return True
            if name.endswith(".w1.weight_packed"):
                return bool(32 * entry["shape"][1] == 4 * columns)
    return False


def check(
    folder: Path, backend: str | None, arguments: argparse.Namespace, reference: dict[str, Any]
) -> dict[str, Any]:
    """One row: how the engine's log-probs differ from the reference, in all and on either side of `--split` tokens."""
    row: dict[str, Any] = {"checkpoint": folder.name, "backend": backend or "default"}
    log = Path(arguments.logs) / f"{folder.name}-{row['backend']}.log" if arguments.logs else None
    try:
        report = run_probe(
            DEFAULT,
            folder,
            reference["prompts"],
            moe_backend=backend,
            kv_cache_memory_bytes=KV_BYTES,
            gpu_memory_utilization=round(0.9 / arguments.jobs, 2),
            env=ENV,
            timeout_s=arguments.timeout,
            log=log,
        )
    except M3QuantError as error:
        return row | {"status": "failed", "error": str(error)}
    row |= {
        "status": "whole" if report.complete else "incomplete",
        "problems": report.problems(),
        "vllm": report.version,
        "device": report.device,
        "kernels": report.kernels,
        "notes": report.notes,
        "seconds": report.seconds,
    }
    expected = reference["references"].get(folder.name)
    if expected and report.logprobs:
        bad = sum(not math.isfinite(value) for prompt in report.logprobs for value in prompt)
        if bad:
            first = [next((t for t, v in enumerate(p) if not math.isfinite(v)), None) for p in report.logprobs]
            return row | {"status": f"{bad} log-probs not finite, first at {first}"}
        row |= differences(report, expected, arguments.split)
    return row


def differences(report: EngineReport, expected: dict[str, Any], split: int) -> dict[str, Any]:
    found = {"all": asdict(report.compare(expected["logprobs"], expected["top1"]))}
    for name, part in (("before", slice(0, split - 1)), ("after", slice(split - 1, None))):
        ours, theirs = [row[part] for row in report.logprobs], [row[part] for row in expected["logprobs"]]
        if any(ours):
            found[name] = asdict(difference(ours, theirs))
    return {"difference": found}


def table(rows: list[dict[str, Any]], split: int) -> str:
    lines = [
        f"| checkpoint | MoE backend | loaded | mean | p99 | max | same top-1 | mean, first {split} | mean, after | load s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = row.get("difference", {})
        whole = found.get("all", {})

        def number(part: str, key: str, found: dict[str, Any] = found) -> str:
            value = found.get(part, {}).get(key)
            return "" if value is None else f"{value:.4f}"

        top1 = "" if whole.get("top1_agreement") is None else f"{whole['top1_agreement']:.1%}"
        cells = [
            row["checkpoint"], row["backend"], row["status"], number("all", "mean"), number("all", "p99"), number("all", "max"),
            top1, number("before", "mean"), number("after", "mean"), str(row.get("seconds", {}).get("load", "")),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--reference", required=True, type=Path)
    parser.add_argument("--output", type=Path, help="rows as JSON")
    parser.add_argument("--logs", help="folder for the engines' logs")
    parser.add_argument("--jobs", type=int, default=4, help="engines at once on the GPU")
    parser.add_argument(
        "--split", type=int, default=512, help="tokens that M3's attention reads whole (topk_blocks x block)"
    )
    parser.add_argument(
        "--timeout", type=float, default=400.0, help="seconds per engine; the first INT4 one compiles Marlin"
    )
    arguments = parser.parse_args()
    reference = json.loads(arguments.reference.read_text())
    runs = [
        (folder, backend)
        for folder in arguments.folders
        for backend in ([None, "emulation"] if has_int4_experts(folder) else [None])
    ]
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(lambda run: check(*run, arguments, reference), runs):
            rows.append(row)
            print(
                row["checkpoint"],
                row["backend"],
                row["status"],
                row.get("error", ""),
                *row.get("problems", []),
                flush=True,
            )
            if arguments.output:  # after every row: a run that is cut short keeps what it has
                arguments.output.write_text(json.dumps(rows, indent=1))
    first = next((row for row in rows if "vllm" in row), {})
    print(f"\nvLLM {first.get('vllm')} on {first.get('device')}\n{table(rows, arguments.split)}")
    for line in sorted({line for row in rows for line in [*row.get("kernels", []), *row.get("notes", [])]}):
        print(line)
    return 0 if all(row["status"] == "whole" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
