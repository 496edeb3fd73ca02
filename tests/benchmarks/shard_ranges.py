"""What reading whole shards costs over reading ranges: `python -m tests.benchmarks.shard_ranges --config CONFIG --to awq`.

Of a config.json alone, with tensors in the order of the layers and shards that end where they are full, as releases have them. By the
plan of the conversion, and for a pass that reads only what the language model computes with (eval, fit --measure):

    bytes_needed   of the tensors that are read, which is what ranges would fetch
    once           fetched where the disk lets every shard stay until its last use
    least          fetched where the disk holds the shards of one layer alone
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from m3quant.checkpoint import Checkpoint
from m3quant.checkpoint.shard_plan import AHEAD, Step, plan_shards
from m3quant.planning.plan import Plan, make_plan
from m3quant.planning.streaming import ahead_of, conversion_steps, head_names, layer_steps
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.running.words import size_of
from tests.support.publish.synthetic import SHARD_BYTES, SyntheticModel


def layout(config: Path, to: str, shard_bytes: int) -> dict[str, Any]:
    """The figures of one release's layout. shard_bytes: as many as a shard has at most."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint.open(_hollow(SyntheticModel(config, shard_bytes=shard_bytes), Path(folder)))
        plan = make_plan(checkpoint, build_recipe(named_recipe(to)))
        return {
            "config": str(config),
            "model_bytes": checkpoint.nbytes,
            "shards": len(checkpoint.shards),
            "convert": _against(conversion_steps(plan), checkpoint, checkpoint.tensors, ahead_of(plan)),
            "a pass of the language model": _against(layer_steps(plan, 0), checkpoint, _of_language_model(plan)),
        }


def _hollow(model: SyntheticModel, folder: Path) -> Path:
    """The checkpoint with headers alone: what comes after them is a hole, which takes no disk."""
    for name, data in model.files.items():
        (folder / name).write_bytes(data)
    for name, shard in model.shards.items():
        (folder / name).write_bytes(shard.data)
        os.truncate(folder / name, shard.size)
    return folder


def _of_language_model(plan: Plan) -> set[str]:
    sources = [t.source for unit in plan.units if unit.layer is not None for t in unit.tensors]
    sources += [plan.sources[name] for name in {plan.family.embedding_name, *head_names(plan.family)}]
    return {part.name for source in sources for part in source.stored}


def _against(steps: Sequence[Step], checkpoint: Checkpoint, read: Iterable[str], ahead: int = AHEAD) -> dict[str, Any]:
    needed, sizes = sum(checkpoint.tensors[name].nbytes for name in read), checkpoint.shard_sizes
    free = plan_shards(steps, sizes, None, ahead)
    tight = plan_shards(steps, sizes, free.least, ahead)
    return {
        "bytes_needed": needed,
        "once": {"disk": free.least_once, "bytes": free.fetch_bytes, "over": free.fetch_bytes / needed - 1},
        "least": {"disk": free.least, "bytes": tight.fetch_bytes, "over": tight.fetch_bytes / needed - 1},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True, action="append")
    parser.add_argument("--to", default="awq")
    parser.add_argument("--shard", default=str(SHARD_BYTES))
    given = parser.parse_args()
    for config in given.config:
        print(json.dumps(layout(config, given.to, size_of(given.shard) or SHARD_BYTES), indent=2))


if __name__ == "__main__":
    main()
