"""Conversions of tiny random checkpoints in one call: no tokenizer, windows of random ids, a progress that says nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from m3quant.calibration.corpus import Windows
from m3quant.checkpoint import Checkpoint
from m3quant.convert.job import Settings
from m3quant.convert.start import convert
from m3quant.planning.plan import Plan, make_plan
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.running.progress import Silent
from tests.support.calibration import tiny

# The least that calibration needs: two windows to search on, one held out.
FEW = {"windows": 2, "window_length": 32, "heldout_windows": 1, "min_expert_tokens": 4}
COARSE = {"n_grid": 3}
QUICK = {"rounds": 0}
SMALL: dict[str, dict[str, Any]] = {
    "m2": {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "m3": {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
}
# Values that differ from run to run, in the manifest and in the report's JSON. report.html shows them too.
TIMES = ("finished", "seconds")
REPORT_PAGE = "m3quant-report/report.html"


def served_format(family: str, to: str, fmt: str | None) -> str | None:
    """The format to ask for: vLLM loads the DeepSeek-style `fp8` for M2 only, so M3's blocks go to compressed-tensors."""
    return "compressed-tensors" if family == "m3" and to == "fp8-block" else fmt


def make_source(folder: Path, family: str, seed: int = 0, **overrides: Any) -> Path:
    """A tiny checkpoint of `family` ("m2" or "m3") with few experts."""
    make = tiny.make_tiny_m2 if family == "m2" else tiny.make_tiny_m3
    return make(folder, seed, **{**SMALL[family], **overrides})


def add_tokenizer(folder: Path) -> Path:
    """Put a tokenizer of one token per byte into a checkpoint folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def make_plan_of(
    source: Path,
    to: str = "awq",
    settings: Sequence[str] = (),
    format: str | None = None,
    **document: Any,
) -> Plan:
    """The plan of a shipped recipe with `document` laid over it; calibrated recipes get few windows and a coarse grid."""
    base = {**named_recipe(to), "data": FEW, "awq": COARSE, "feedback": QUICK}
    if "calibration" in document:  # it implies a rounding of its own
        base.pop("rounding", None)
    base |= document
    return make_plan(Checkpoint.open(source), build_recipe(base, settings=settings, format=format))


def quickly_calibrated(recipe: str) -> dict[str, Any]:
    """What to lay over a calibrated recipe that is converted dozens of times: durable operations are the same for any rounding and any
    search, and AWQ's least search takes the least time on a CPU."""
    return {"rounding": "awq", "awq": {"n_grid": 1, "range_search": False}} if recipe.startswith("awq") else {}


def random_windows(plan: Plan, seed: int = 0) -> Windows:
    """Windows of random token ids of the shape that the plan's recipe asks for."""
    data = plan.recipe.data
    vocab = plan.family.vocab_size
    shape = (data.windows + data.heldout_windows, data.window_length)
    ids = np.random.default_rng(seed).integers(0, vocab, shape)
    kinds = np.full((shape[0], 1), shape[1])
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    return Windows(ids, kinds, ("text",), digest, "corpus", "tokenizer", seed, "random ids")


def run_plan(plan: Plan, output: Path, *, seed: int = 0, progress: Silent | None = None, **how: Any) -> dict[str, Any]:
    """Convert `plan` into `output`, with random windows where it calibrates. `how` goes to Settings."""
    settings = Settings(**how)
    if plan.recipe.calibration != "none":
        settings.windows = random_windows(plan, seed)
    return convert(plan, output, settings, progress or Silent())


def run_convert(source: Path, output: Path, to: str = "awq", **options: Any) -> dict[str, Any]:
    """Plan and convert in one call; options as of `make_plan_of`."""
    return run_plan(make_plan_of(source, to, **options), output)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder by name, read with the safetensors library."""
    out = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                out[name] = file.get_tensor(name)
    return out


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, whatever its dtype."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def files(folder: Path, but: Sequence[str] = ()) -> dict[str, bytes]:
    """Relative name -> bytes of every file below `folder`, hidden ones too, without those that start with one of `but`."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(tuple(but) or ("\0",))}


def without_times(value: Any) -> Any:
    """A JSON value without the keys of TIMES, at any depth."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def same_output(left: Path, right: Path) -> list[str]:
    """Names of the files in which two outputs differ, times left out."""
    a, b = (
        files(folder, but=(REPORT_PAGE, "eval.json")) for folder in (left, right)
    )  # eval.json has the folder's name
    differing = sorted(a.keys() ^ b.keys())
    for name in sorted(a.keys() & b.keys()):
        if a[name] != b[name]:
            timed = name == "m3quant.json" or name.startswith("m3quant-report/")
            if not timed or without_times(json.loads(a[name])) != without_times(json.loads(b[name])):
                differing.append(name)
    return differing


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def rewrite(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint of these tensors into `folder`, three shards and an index."""
    return tiny.write_checkpoint(folder, dict(config or config_of(folder)), dict(tensors))
