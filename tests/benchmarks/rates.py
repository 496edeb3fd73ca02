"""A record of rates for `m3quant plan --rates` from figures of the benchmark: `python -m tests.benchmarks.rates OUT FIGURES.json...`.

FIGURES are what `tests.benchmarks.convert --json` wrote on one machine. Each rate is the median of those in the files; what the
calibrated stages do comes from runs of calibrated recipes, and what these take beyond all stages is "start". Prints how far the model is from every run in them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from m3quant.planning.headers import from_config
from m3quant.planning.plan import Plan, make_plan
from m3quant.planning.timing_model import SEARCH_RATE, Rates, estimate, forward_flops, search_flops
from m3quant.recipe.recipe import build_recipe, named_recipe

from .wide import wide_config


def plan_of(result: dict[str, Any]) -> Plan:
    """The plan that a result is of, from its shape alone."""
    stored = result.get("stored", "plain")
    config = wide_config(result["shape"], result["layers"], result["experts"], result["narrower"], stored)
    document = named_recipe(result["recipe"])
    if result["recipe"] == "awq" and "rounding" not in result:  # measured before feedback became the default
        document = {**named_recipe("awq-fp8"), "rounding": "awq"}
    if document.get("calibration") != "none":
        data = {"windows": result["windows"], "window_length": result["window_length"]}
        document = {**document, "data": {**document.get("data", {}), **data}}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        return make_plan(from_config(path), build_recipe(document))


def shared(disk: dict[str, Any]) -> float:
    low, high = sorted((disk["read_seconds"], disk["write_seconds"]))
    return max(0.0, (disk["both_seconds"] - high) / low)


def record(results: list[dict[str, Any]], source: str) -> Rates:
    """Medians over results of one machine. Raises SystemExit where they are of several."""
    machines = {(r["machine"]["device"], r["machine"]["cores"]) for r in results}
    if len(machines) != 1:
        raise SystemExit(f"the figures are of several machines: {sorted(machines)}")
    device, cores = machines.pop()
    rates: dict[str, float] = {
        "read": median(r["disk"]["read"] for r in results),
        "write": median(r["disk"]["write"] for r in results),
        "shared": median(shared(r["disk"]) for r in results),
    }
    for name in ("hash", "h2d", "d2h", "pack"):
        if found := [r["rates"][name] for r in results if name in r["rates"]]:
            # one CPU thread was measured, and every core has one
            rates[name] = median(found) * (cores if name == "pack" and device == "cpu" else 1)
    for name, flops in (("search", search_flops), ("forward", forward_flops)):
        speeds: dict[str, list[float]] = {}
        for result in results:
            plan = plan_of(result)
            if not plan.recipe.calibrated:
                continue
            for run in result["ours"]:
                stages = {s["stage"]: s["busy"] for s in run.get("timeline", {}).get("stages", [])}
                if stages.get(name):
                    rate = SEARCH_RATE[plan.recipe.rounding] if name == "search" else name
                    speeds.setdefault(rate, []).append(flops(plan) * result["layers"] / stages[name])
        rates |= {rate: median(found) for rate, found in speeds.items()}
    found = Rates(
        machine=f"{device}, {cores} cores",
        measured=max(r["measured"] for r in results),
        versions={"torch": results[0]["machine"]["torch"]},
        source=dict.fromkeys([*rates, "start"], source),
        device_memory=results[0]["machine"].get("device_memory"),
        **rates,
    )
    return found.model_copy(update={"start": beyond(results, found)})


def seconds_of(result: dict[str, Any]) -> float | None:
    """Median of a result's runs; None if all failed."""
    seconds = [run["seconds"] for run in result["ours"] if "seconds" in run]
    return median(seconds) if seconds else None


def beyond(results: list[dict[str, Any]], rates: Rates) -> float:
    """Median seconds that calibrated runs took beyond what their stages tell, at least 0."""
    rest = []
    for result in results:
        plan, seconds = plan_of(result), seconds_of(result)
        if plan.recipe.calibration != "none" and seconds and (estimated := estimate(plan, rates)):
            rest.append(seconds - estimated.seconds)
    return max(0.0, median(rest)) if rest else 0.0


def main() -> None:
    out, *figures = (Path(p) for p in sys.argv[1:])
    if not figures:
        raise SystemExit(__doc__)
    results = [result for path in figures for result in json.loads(path.read_text())]
    rates = record(results, "tests.benchmarks: " + ", ".join(path.name for path in figures))
    out.write_text(rates.model_dump_json(indent=2, exclude_none=True) + "\n")
    print(rates.model_dump_json(indent=2, exclude_none=True))
    for result in results:
        seconds, found = seconds_of(result), estimate(plan_of(result), rates)
        if seconds and found:
            print(
                f"{result['shape']} x{result['layers']}, {result.get('stored', 'plain')}, {result['recipe']}: estimated {found.seconds:.2f} s (bound by {found.bound_by}), "
                f"measured {seconds:.2f} s: {found.seconds / seconds - 1:+.0%}"
            )


if __name__ == "__main__":
    main()
