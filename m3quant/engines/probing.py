"""Loads a checkpoint in a real engine, in its own Python, and reports the result.

The work is done by the engine's probe in a subprocess, so the engine may be in another environment, and its crash does not end m3quant.
Torch-free.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.bounded import CONFIG_BYTES, read_bounded
from ..checkpoint.strict_json import parse_object
from ..errors import EngineMissing, VerifyError
from ..families import family_of
from . import ENGINES
from .base import Engine, LoadingProbe

NAMES_SHOWN = 8  # of a long list of tensors, in a message
LOG_LINES_SHOWN = 15
LOG_BYTES = 64 * 2**20  # what is read of an engine's output


@dataclass(frozen=True)
class Difference:
    """Absolute differences of log-probs (natural logarithm) between an engine and a reference."""

    tokens: int
    mean: float
    median: float  # small compared with a large mean: rounding decided a few near-ties (expert, block) differently, no weight is wrong
    p99: float
    max: float
    top1_agreement: float | None  # share of tokens whose most likely id is the same

    def __str__(self) -> str:
        top1 = "" if self.top1_agreement is None else f", same top-1 {self.top1_agreement:.1%}"
        return f"mean {self.mean:.2g}, median {self.median:.2g}, p99 {self.p99:.2g}, max {self.max:.2g} over {self.tokens} tokens{top1}"


@dataclass(frozen=True)
class EngineReport:
    """What an engine made of a checkpoint.

    missing: parameters that no checkpoint tensor filled. partial: name -> (elements written, elements) of those filled in part.
    unexpected: checkpoint tensors that filled nothing; never_read: those of them in a file that the engine did not read.
    skipped: tensors that a text-only engine leaves out on purpose, counted ("vision", "mtp"); they are not checked.
    logprobs[i][t]: log-prob of prompt i's token t+1 given those before it; top1[i][t]: the most likely id there.
    """

    engine: str  # as sentences call it
    version: str
    torch: str
    python: str
    platform: str
    device: str
    parameters: int
    tensors: int
    missing: list[str]
    partial: dict[str, tuple[int, int]]
    unexpected: list[str]
    never_read: list[str]
    skipped: dict[str, int]
    engine_check: str | None
    notes: list[str]
    kernels: list[str]
    seconds: dict[str, float]
    logprobs: list[list[float]] = field(repr=False)
    top1: list[list[int]] = field(repr=False)
    score_error: str | None = None  # why an incomplete checkpoint could not be scored

    @property
    def complete(self) -> bool:
        """Every parameter filled and every tensor used."""
        return not (self.missing or self.partial or self.unexpected)

    def problems(self) -> list[str]:
        """One sentence per kind of defect, with the names; empty if the checkpoint was loaded whole."""
        found = []
        if self.missing:
            found.append(
                f"{self.engine} {self.version} found no weights for {len(self.missing)} of its {self.parameters} parameters, which are left "
                f"uninitialised: {shorten(self.missing)}."
            )
        if self.partial:
            shares = [
                f"{name} ({written} of {elements} elements)" for name, (written, elements) in self.partial.items()
            ]
            found.append(
                f"{self.engine} {self.version} filled {len(shares)} fused parameters only in part: {shorten(shares)}."
            )
        if self.unexpected:
            found.append(
                f"{self.engine} {self.version} silently skipped {len(self.unexpected)} of the checkpoint's {self.tensors} tensors: "
                f"{shorten(self.unexpected)}; it has no parameter of these names under this quantization_config."
            )
        return found

    def compare(self, logprobs: Sequence[Sequence[float]], top1: Sequence[Sequence[int]] | None = None) -> Difference:
        """Difference from reference log-probs of the same prompts. Raises VerifyError if the shapes or numbers do not fit."""
        return difference(self.logprobs, logprobs, self.top1, top1)


def shorten(names: Sequence[str], shown: int = NAMES_SHOWN) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def difference(
    ours: Sequence[Sequence[float]],
    reference: Sequence[Sequence[float]],
    our_top1: Sequence[Sequence[int]] | None = None,
    reference_top1: Sequence[Sequence[int]] | None = None,
) -> Difference:
    """Absolute differences of two sets of log-probs. Raises VerifyError where they do not pair up or are not finite."""
    if [len(row) for row in ours] != [len(row) for row in reference]:
        raise VerifyError(
            "the engine's log-probs and the reference's are not of the same prompts: compare equal token lists."
        )
    pairs = [(a, b) for row, other in zip(ours, reference, strict=True) for a, b in zip(row, other, strict=True)]
    if not pairs:
        raise VerifyError("there is no token to compare: give prompts of at least two tokens.")
    errors = sorted(abs(a - b) for a, b in pairs)
    if not all(math.isfinite(error) for error in errors):
        raise VerifyError(
            "the engine or the reference gave a log-prob that is not finite: the checkpoint holds NaN, Inf or garbage."
        )
    agreement = None
    if our_top1 is not None and reference_top1 is not None:
        same = [
            a == b for row, other in zip(our_top1, reference_top1, strict=True) for a, b in zip(row, other, strict=True)
        ]
        agreement = sum(same) / len(same)
    p99 = errors[min(len(errors) - 1, math.ceil(0.99 * len(errors)) - 1)]
    return Difference(len(errors), statistics.fmean(errors), statistics.median(errors), p99, errors[-1], agreement)


PROBED = tuple(engine for engine in ENGINES if engine.probe is not None)


def find_probed(explicit: str | None = None) -> tuple[Engine, str]:
    """The first engine with a loading probe that is installed, and its Python (see `Engine.find_python`).

    Raises EngineMissing, of the first engine, where none is.
    """
    missing: EngineMissing | None = None
    for engine in PROBED:
        try:
            return engine, engine.find_python(explicit)
        except EngineMissing as error:
            missing = missing or error
    assert missing is not None
    raise missing


def run_probe(
    engine: Engine,
    model: str | Path,
    prompts: Sequence[Sequence[int]],
    *,
    python: str | None = None,
    max_model_len: int | None = None,
    dtype: str = "auto",
    moe_backend: str | None = None,
    block_size: int | None = None,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float | None = None,
    kv_cache_memory_bytes: int | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 3600.0,
    log: Path | None = None,
) -> EngineReport:
    """Load the folder `model` in the engine and score `prompts` (token ids, at least two each).

    An incomplete load is a report (see `EngineReport.problems`), not an error. Raises VerifyError when there is no engine, and when
    it runs out of memory or time, or crashes. `log`: where to keep the engine's output; else it is dropped on success.
    """
    probe = engine.probe
    if probe is None:
        raise VerifyError(f"{engine.title} has no loading probe here: its word on a checkpoint cannot be had.")
    folder = Path(model).resolve()
    if not (folder / "config.json").is_file():
        raise VerifyError(f"{folder} holds no config.json: give the folder of a finished checkpoint.")
    if not prompts or any(len(prompt) < 2 for prompt in prompts):
        raise VerifyError("the engine check needs prompts of at least two tokens each.")
    config = parse_object(
        read_bounded(folder / "config.json", CONFIG_BYTES),
        str(folder / "config.json"),
        "Copy it again.",
        constants=True,
    )
    request = {
        "model": str(folder),
        "family": probe.facts(family_of(config, str(folder / "config.json"))),
        "prompts": [list(map(int, prompt)) for prompt in prompts],
        "max_model_len": max_model_len,
        "dtype": dtype,
        "moe_backend": moe_backend,
        "block_size": block_size,
        "tensor_parallel_size": tensor_parallel_size,
        "gpu_memory_utilization": gpu_memory_utilization,
        "kv_cache_memory_bytes": kv_cache_memory_bytes,
        "env": dict(env or {}),
    }
    interpreter = engine.find_python(python)
    with tempfile.TemporaryDirectory(prefix="m3quant-engine-") as scratch:
        work = Path(scratch)
        (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
        log_path = log or work / "engine.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [interpreter, str(probe.script), str(work / "request.json"), str(work / "response.json")]
        code = _run(engine, command, log_path, timeout_s)
        text = _end_of(log_path)
        response_path = work / "response.json"
        response = json.loads(response_path.read_text(encoding="utf-8")) if response_path.is_file() else None
    return _report(engine, probe, response, code, text, folder)


def _run(engine: Engine, command: list[str], log: Path, timeout_s: float) -> int:
    """Exit code of `command`, its output in `log`. Raises VerifyError on timeout, with all its processes ended."""
    with log.open("wb") as output, _session(command, output) as process:
        deadline = time.monotonic() + timeout_s
        try:
            return process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            tail = _tail(_end_of(log))
            raise VerifyError(
                f"{engine.title} did not finish within {timeout_s:.0f} s: give it more time with --engine-timeout. Its last lines:\n{tail}"
            ) from error


@contextmanager
def _session(command: list[str], output: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own; on the way out its whole group is ended, workers included."""
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # every process of the group has ended already
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_of(log: Path) -> str:
    """The log, or the last LOG_BYTES of a longer one."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
        return file.read(LOG_BYTES).decode("utf-8", "replace")


def _tail(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    return "\n".join(lines[-LOG_LINES_SHOWN:])


def _report(
    engine: Engine, probe: LoadingProbe, response: dict[str, Any] | None, code: int, log: str, folder: Path
) -> EngineReport:
    error = (response or {}).get("error")
    detail = f"{error['type']}: {error['message']}" if error else ""
    weights_known = response is not None and response["tensors"] > 0
    incomplete = weights_known and bool(response["missing"] or response["partial"] or response["unexpected"])  # type: ignore[index]
    if response is None or (error and not incomplete):
        # Without a response the process died; exit code -9 is the kernel's memory killer more often than not.
        if code in (-signal.SIGKILL, 137) or probe.no_memory.search(detail or _tail(log)):
            reason = detail.splitlines()[0] if detail else "the process was killed"
            raise VerifyError(
                f"{engine.title} ran out of memory loading {folder} ({reason}): use a larger machine, a smaller max_model_len, or more GPUs "
                "(tensor_parallel_size)."
            )
        if error:
            raise VerifyError(
                f"{engine.title} refused {folder}: {detail}\nLast lines:\n"
                + "\n".join(error["trace"][-LOG_LINES_SHOWN:])
            )
        raise VerifyError(f"{engine.title} crashed on {folder} with exit code {code}. Its last lines:\n{_tail(log)}")
    return EngineReport(
        engine=engine.title,
        version=response["version"],
        torch=response["torch"],
        python=response["python"],
        platform=response["platform"],
        device=response["device"],
        parameters=response["parameters"],
        tensors=response["tensors"],
        missing=response["missing"],
        partial={entry["name"]: (entry["written"], entry["elements"]) for entry in response["partial"]},
        unexpected=response["unexpected"],
        never_read=response["never_read"],
        skipped=response["skipped"],
        engine_check=response["engine_check"],
        notes=response["notes"],
        kernels=list(dict.fromkeys(match.group(1).strip() for match in probe.kernel.finditer(log))),
        seconds=response["seconds"],
        logprobs=response["logprobs"],
        top1=response["top1"],
        score_error=detail or None,
    )
