"""Plain vLLM, RESERVE=all and RESERVE=learned on a model of vLLM's scheduler, in steps: the same requests in every arm, whatever the machine does.

    python -m tests.benchmarks.guard_reserve_model [--steps 3000] [--seeds 2] [--json FILE]

A step of the model gives each running sequence a token; what a step costs on a real engine is not modelled (tests/benchmarks/guard_reserve.py).
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from statistics import mean
from typing import Any

from tests.support.runtime.guarded_scheduler import Draw, Run, ends_by_itself, known_lengths, plain
from tests.support.runtime.scheduler_model import BLOCK, BLOCKS, SEQUENCES


def two_kinds(rng: random.Random) -> tuple[int, int, int]:
    length = rng.randint(10, 30) if rng.random() < 0.5 else rng.randint(200, 319)
    return rng.randint(4, 200), length, 320


def small_part_of_the_most(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(4, 200), rng.randint(30, 60), 800


def lognormal(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(4, 200), max(1, min(600, int(math.exp(rng.gauss(4, 1))))), 600


LOADS: dict[str, Draw] = {
    "answers as long as they may be (16 to 320)": known_lengths,
    "ended by chance, mean 80 of 320": ends_by_itself,
    "half of 10 to 30, half of 200 to 319, of 320": two_kinds,
    "30 to 60 of 800": small_part_of_the_most,
    "log-normal, median 55, of 600": lognormal,
}

POOLS = [{"blocks": BLOCKS, "most_running": SEQUENCES}, {"blocks": 8 * BLOCKS, "most_running": 8 * SEQUENCES}]


def arms(draw: Draw, steps: int, seeds: int, pool: dict[str, int]) -> dict[str, Any]:
    plain_runs = [plain(draw, steps, seed, **pool) for seed in range(seeds)]
    tokens = sum(run[0] for run in plain_runs)
    found: dict[str, Any] = {"plain": row(tokens / steps / seeds, mean(run[1] for run in plain_runs))}
    for name, learned in (("all", False), ("learned", True)):
        runs = [Run(draw, learned=learned, seed=seed, **pool).steps(steps) for seed in range(seeds)]
        written = sum(run.scheduler.written for run in runs)
        found[name] = row(written / steps / seeds, mean(run.preempted_share for run in runs))
        found[name]["over_plain"] = round(written / tokens, 3)
    return found


def row(tokens_a_step: float, preempted_share: float) -> dict[str, float]:
    return {"tokens_a_step": round(tokens_a_step, 2), "preempted_share": round(preempted_share, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = {
        f"{pool['blocks']} blocks": {
            name: arms(draw, options.steps, options.seeds, pool) for name, draw in LOADS.items()
        }
        for pool in POOLS
    }
    command = f"python -m tests.benchmarks.guard_reserve_model --steps {options.steps} --seeds {options.seeds}"
    text = json.dumps({"command": command, "block_size": BLOCK, "pools": POOLS, "runs": runs}, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
