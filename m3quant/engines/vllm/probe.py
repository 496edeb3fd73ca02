"""Loads a checkpoint folder in the installed vLLM, accounts for every weight, and scores prompts. Run by m3quant.engines.probing.

    ENGINE_PYTHON engine_probe.py request.json response.json

It runs in the engine's own environment, so it imports nothing of m3quant: only the standard library, torch and vllm.

Why vLLM's own accounting is not used: its model loaders skip a tensor whose name they do not know, and its
`enable_weights_track` looks at whole parameters by name. In 0.26 it even exempts every quantized layer. So a fused parameter
of which only q, k and v were filled counts as loaded. Here loading is observed at the level of torch: every in-place write into a
parameter's storage is seen by a torch dispatch mode and credited to the checkpoint tensor being loaded at that moment.
That gives, by name, the parameters (or the share of a fused parameter) that no tensor filled, and the tensors that
filled nothing.

Request:  model, family (as `probe_facts` gives it), prompts [[token id]], max_model_len, dtype, moe_backend, block_size, tensor_parallel_size,
          gpu_memory_utilization, kv_cache_memory_bytes, env {name: value}.
Response: status "ok" | "incomplete" | "failed", version (of vLLM), torch, python, platform, device, parameters, tensors, missing, partial, unexpected,
          never_read, skipped, engine_check, notes, seconds, logprobs, top1, error. `empty_response` documents each.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# This file's folder holds modules named log, memory, command, ...: none of them may shadow an engine's import.
_HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [entry for entry in sys.path if entry == "" or str(Path(entry).resolve()) != _HERE]

GEMMA_NORM = "M3QUANT_PROBE_GEMMA_NORM"  # what spawned engine processes must repair, see prepare_process
REPORT_FOLDER = "M3QUANT_PROBE_REPORTS"  # each engine process leaves its weight report in this folder

# Parameters that the engine makes and fills itself when a checkpoint has none: KV-cache scales, and the index of GPTQ's
# activation order, which vLLM 0.26 registers for every packed expert.
ENGINE_FILLED = re.compile(r"(^|\.)([kvq]|prob)_(scale|zero_point)$|(^|[._])g_idx(_sort_indices)?$|input_scale_ub$")


# ---- weight accounting, in every engine process ------------------------------------------------------------------------


class WeightLedger:
    """Which elements of which parameters were written while loading, and by which checkpoint tensor."""

    def __init__(self, model: Any) -> None:
        self.parameters: dict[str, Any] = dict(model.named_parameters())
        self.owners: dict[int, list[str]] = {}  # address of a storage -> parameter and buffer names in it
        for name, tensor in [*self.parameters.items(), *model.named_buffers()]:
            if tensor.numel() and tensor.device.type != "meta":
                self.owners.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
        self.regions: dict[str, set[tuple[Any, ...]]] = {}
        self.written: dict[str, int] = {}  # parameter -> elements in distinct written regions
        self.current: str | None = None
        self.read: dict[str, bool] = {}  # checkpoint tensor -> did it fill anything

    def watch(self, weights: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """`weights` unchanged, while remembering which tensor is being loaded."""
        for name, tensor in weights:
            self.current = name
            self.read.setdefault(name, False)
            yield name, tensor
        self.current = None

    def record_write(self, tensor: Any) -> None:
        names = self.owners.get(tensor.untyped_storage().data_ptr())
        if not names or self.current is None:
            return
        self.read[self.current] = True
        region = (tensor.storage_offset(), *tensor.shape, *tensor.stride())
        for name in names:
            seen = self.regions.setdefault(name, set())
            if region not in seen:
                seen.add(region)
                self.written[name] = self.written.get(name, 0) + tensor.numel()

    def report(self) -> dict[str, Any]:
        missing, partial = [], []
        for name, parameter in self.parameters.items():
            # Padded parameters say how many elements a checkpoint has for them.
            wanted = int(getattr(parameter, "weight_loader_numel", parameter.numel()))
            written = self.written.get(name, 0)
            if wanted == 0 or ENGINE_FILLED.search(name):
                continue
            if written == 0:
                missing.append(name)
            elif written < wanted:
                partial.append({"name": name, "written": written, "elements": wanted})
        return {
            "parameters": len(self.parameters),
            "missing": missing,
            "partial": partial,
            "read": sorted(self.read),
            "taken": sorted(name for name, taken in self.read.items() if taken),
        }


def watch_writes(ledger: WeightLedger) -> Any:
    """A torch dispatch mode that reports to `ledger` every tensor written in place under it."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class WriteWatcher(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func._schema.is_mutable:
                for argument, value in zip(func._schema.arguments, args, strict=False):
                    if (
                        argument.alias_info is not None
                        and argument.alias_info.is_write
                        and isinstance(value, torch.Tensor)
                    ):
                        ledger.record_write(value)
            return result

    return WriteWatcher()  # type: ignore[no-untyped-call]  # torch has not annotated the constructor


def install_accounting() -> None:
    """Wrap vLLM's loader in this process so that each model load leaves a report in the folder REPORT_FOLDER names.

    A complaint of vLLM's own tracking is kept in the report instead of ending the process: the report names more.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load_weights, get_all_weights = DefaultModelLoader.load_weights, DefaultModelLoader.get_all_weights

    def accounted(self: Any, model: Any, model_config: Any) -> None:
        ledger = WeightLedger(model)
        self._m3quant_ledger = ledger
        complaint = None
        try:
            with watch_writes(ledger):
                load_weights(self, model, model_config)
        except ValueError as error:
            if "not initialized from" not in str(error):
                raise
            complaint = str(error)
        finally:
            report = ledger.report() | {"engine_check": complaint, "notes": _notes}
            path = Path(os.environ[REPORT_FOLDER]) / f"weights-{os.getpid()}.json"
            path.write_text(json.dumps(report), encoding="utf-8")

    def watched(self: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        weights: Iterator[tuple[str, Any]] = get_all_weights(self, *args, **kwargs)
        ledger: WeightLedger | None = getattr(self, "_m3quant_ledger", None)
        return weights if ledger is None else ledger.watch(weights)

    DefaultModelLoader.load_weights = accounted
    DefaultModelLoader.get_all_weights = watched


_notes: list[str] = []


def replace_gemma_norm(target: str) -> None:
    """Where flashinfer is not installed, give a Gemma norm of vLLM's that has no other fallback ("module:class") its plain formula."""
    import importlib

    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return
    with contextlib.suppress(ImportError):
        import flashinfer.norm  # noqa: F401

        return
    module, _, name = target.partition(":")
    norm = getattr(importlib.import_module(module), name)

    def forward(self: Any, x: Any, residual: Any = None) -> Any:
        total = x if residual is None else x + residual
        wide = total.float()
        normed = (
            wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1.0 + self.weight.float())
        )
        return normed.to(x.dtype) if residual is None else (normed.to(x.dtype), total)

    norm.forward = forward
    _notes.append(f"flashinfer is not installed: {name} ran as its plain formula in float32.")


def prepare_process(gemma_norm: str) -> None:
    """gemma_norm: "module:class" of a norm to give a fallback, or ''."""
    install_accounting()
    if gemma_norm:
        replace_gemma_norm(gemma_norm)


if __name__ == "__mp_main__" and REPORT_FOLDER in os.environ:  # a worker that multiprocessing spawned (tensor parallel)
    prepare_process(os.environ.get(GEMMA_NORM, ""))


# ---- the probe -----------------------------------------------------------------------------------------------------


def header_names(folder: Path) -> set[str]:
    """Names of all tensors in the folder's safetensors files, from the headers."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            names |= set(json.loads(file.read(size)))
    return names - {"__metadata__"}


def engine_arguments(request: dict[str, Any]) -> dict[str, Any]:
    """Arguments of vllm.LLM for a request; those of the family give way to those of the caller."""
    prompts = request["prompts"]
    longest = max((len(prompt) for prompt in prompts), default=1)
    arguments: dict[str, Any] = {
        "model": request["model"],
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "dtype": request.get("dtype") or "auto",
        "max_model_len": request.get("max_model_len") or longest + 1,
        # One prompt at a time: vLLM 0.26 gives NaN for the second of two M3 prompts in one batch, unquantized ones too.
        "max_num_seqs": 1,
        "tensor_parallel_size": request.get("tensor_parallel_size") or 1,
        "model_loader_extra_config": {"enable_weights_track": True},
        **request["family"]["arguments"],
    }
    for name in ("block_size", "moe_backend", "gpu_memory_utilization", "kv_cache_memory_bytes"):
        if request.get(name):
            arguments[name] = request[name]
    return arguments


def weight_reports(folder: Path) -> dict[str, Any]:
    """The reports of all engine processes as one: a tensor is taken if any took it, a parameter missing if any misses it."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("weights-*.json"))]
    taken = {name for report in reports for name in report["taken"]}
    read = {name for report in reports for name in report["read"]}
    partial = {entry["name"]: entry for report in reports for entry in report["partial"]}
    return {
        "parameters": max((report["parameters"] for report in reports), default=0),
        "missing": sorted({name for report in reports for name in report["missing"]}),
        "partial": [partial[name] for name in sorted(partial)],
        "read": read,
        "taken": taken,
        "engine_check": next((report["engine_check"] for report in reports if report["engine_check"]), None),
        "notes": sorted({note for report in reports for note in report["notes"]}),
    }


def skipped_by_design(name: str, family: dict[str, Any]) -> str | None:
    """Why a text-only engine has no use for this tensor, or None if it should have been loaded."""
    if name.startswith(tuple(family["towers"])):
        return "vision"
    if name in family["unread"]:
        return "tied"
    layers = family["layers"]
    layer = re.search(r"\blayers\.(\d+)\.", name)
    if "mtp." in name or (layer and int(layer.group(1)) >= layers):
        return "mtp"
    return None


def account(reports: dict[str, Any], folder: Path, family: dict[str, Any]) -> dict[str, Any]:
    """Response fields on the weights, from the merged reports and the folder's headers."""
    stored = header_names(folder)
    skipped: dict[str, int] = {}
    unexpected = []
    for name in sorted(stored - reports["taken"]):
        reason = skipped_by_design(name, family)
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            unexpected.append(name)
    fields = ("parameters", "missing", "partial", "engine_check", "notes")
    return {field: reports[field] for field in fields} | {
        "tensors": len(stored),
        "unexpected": unexpected,
        "never_read": sorted(set(unexpected) - reports["read"]),
        "skipped": skipped,
    }


def score(llm: Any, prompts: list[list[int]]) -> tuple[list[list[float]], list[list[int]]]:
    """(log-probs, most likely ids), for tokens 1.. of each prompt given all before them (natural logarithm)."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False),
        use_tqdm=False,
    )
    logprobs, top1 = [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        entries = output.prompt_logprobs[1:]
        logprobs.append([float(entry[token].logprob) for token, entry in zip(prompt[1:], entries, strict=True)])
        # No token has rank 1 where the logits are NaN.
        top1.append([next((token for token, value in entry.items() if value.rank == 1), -1) for entry in entries])
    return logprobs, top1


def probe(request: dict[str, Any], response: dict[str, Any]) -> None:
    """Fill `response`. Raises whatever the engine raises."""
    folder = Path(request["model"])
    family = request["family"]
    os.environ[GEMMA_NORM] = family["gemma_norm"]
    if (request.get("tensor_parallel_size") or 1) > 1:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"

    import torch
    import vllm
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    response |= {
        "version": vllm.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "platform": current_platform.device_type,
        "device": str(current_platform.get_device_name()),
    }
    load_general_plugins()
    prepare_process(family["gemma_norm"])

    started = time.monotonic()
    reports_folder = Path(os.environ[REPORT_FOLDER])
    try:
        llm = vllm.LLM(**engine_arguments(request))
    finally:
        if any(reports_folder.glob("weights-*.json")):
            response |= account(weight_reports(reports_folder), folder, family)
    response["seconds"]["load"] = round(time.monotonic() - started, 2)
    if response["missing"] or response["partial"] or response["unexpected"]:
        response["status"] = "incomplete"  # scored all the same: the size of the damage is worth knowing
    started = time.monotonic()
    response["logprobs"], response["top1"] = score(llm, request["prompts"])
    response["seconds"]["score"] = round(time.monotonic() - started, 2)
    if response["status"] == "running":
        response["status"] = "ok"


def empty_response() -> dict[str, Any]:
    """Every field of a response with its empty value.

    missing: parameters that no tensor filled. partial: fused parameters filled in part (written < elements).
    unexpected: checkpoint tensors that filled nothing; never_read: those of them that vLLM did not even read.
    skipped: tensors a text-only engine leaves out on purpose, counted by reason. engine_check: what vLLM's own tracking said.
    logprobs, top1: see `score`. error: {type, message, trace}.
    """
    return {
        "status": "running", "version": None, "torch": None, "python": None, "platform": None, "device": None,
        "parameters": 0, "tensors": 0, "missing": [], "partial": [], "unexpected": [], "never_read": [], "skipped": {},
        "engine_check": None, "notes": [], "seconds": {}, "logprobs": [], "top1": [], "error": None,
    }  # fmt: skip


def main(request_path: str, response_path: str) -> int:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    response = empty_response()
    # One process, so that the loader's wrapper is where the loader is; tensor parallel workers are spawned and wrap themselves.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # GiB, read on a CPU only: room for the prompts, instead of vLLM's default of nearly all memory.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ |= {name: str(value) for name, value in (request.get("env") or {}).items()}
    reports = Path(response_path).resolve().parent / "weight-reports"
    reports.mkdir(exist_ok=True)
    os.environ[REPORT_FOLDER] = str(reports)
    try:
        probe(request, response)
    except BaseException as error:
        response["status"] = "failed"
        lines = traceback.format_exc().splitlines()
        response["error"] = {"type": type(error).__name__, "message": str(error), "trace": lines[-30:]}
        traceback.print_exc()
    Path(response_path).write_text(json.dumps(response), encoding="utf-8")
    return 1 if response["status"] == "failed" else 0


if __name__ == "__main__":
    code = main(*sys.argv[1:3])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an engine's threads and atexit handlers can hang or crash after the response is written
