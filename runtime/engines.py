"""The engine that is installed: its version, the flags it takes, its devices; and the exact command for it.

Nothing of the engine is imported, neither here nor in its own Python: flags are read from its argument files, because importing
vLLM takes ten seconds and touches the GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from ..errors import EngineMissing, NodeError, RecipeError
from ..families import Family
from ..planning.engine_integers import FIRST_VLLM, integer_notes, is_humming_only, zero_point_notes
from ..schemes import Scheme
from .command import vllm_arguments
from .fit import Fit
from .guard.settings import PREFIX, read_settings
from .hardware import CPU, GPUS, Gpu, Node, cpu_node
from .serve_recipe import ServeRecipe

GUARD = "m3quant.runtime.guard.Guard"
KNOWN_VLLM = (
    Version("0.24.0"),
    Version("0.34.0"),
)  # from the first with M3 to before the first whose source was not read
FP8_INDEX_ON_HOPPER = Version("0.32.0")  # the oldest release read that has it; 0.26 has not
# A folder called vllm or m3quant where the user stands must not be imported in place of the installed one.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
PROBE = r"""
import importlib.metadata, importlib.util, json, pathlib, re, sys
package = sys.argv[1]
spec = importlib.util.find_spec(package)
if spec is None:
    print(json.dumps({"found": False})); sys.exit(0)
root = pathlib.Path(spec.origin).parent
names = set()
files = [root / "engine" / "arg_utils.py", root / "srt" / "server_args.py", *root.glob("entrypoints/**/cli_args.py")]
for file in files:
    if file.is_file():
        text = file.read_text(encoding="utf-8", errors="replace")
        names |= set(re.findall(r'"--([a-z][a-z0-9-]+)"', text))
        names |= {n.replace("_", "-") for n in re.findall(r"^    ([a-z][a-z0-9_]+)\s*:", text, re.M)}
guard = importlib.util.find_spec("m3quant") is not None and importlib.util.find_spec("m3quant.runtime") is not None
versions = []
for dist in importlib.metadata.distributions():
    if (dist.metadata["Name"] or "").lower() in (package, package + "-cpu"):
        versions.append(dist.version)
print(json.dumps({"found": True, "versions": versions, "flags": sorted(names), "m3quant": guard}))
"""


@dataclass(frozen=True)
class Engine:
    """What is installed. flags: names without the dashes; has_m3quant: its Python can import m3quant.runtime."""

    name: str
    python: str
    version: str
    flags: frozenset[str]
    has_m3quant: bool

    @property
    def is_cpu(self) -> bool:
        return "cpu" in self.version

    def takes(self, flag: str) -> bool:
        return flag.removeprefix("--") in self.flags

    @property
    def release(self) -> Version | None:
        try:
            return Version(self.version)
        except InvalidVersion:
            return None


def find_engine(name: str, python: str) -> Engine:
    """The engine `name` (vllm or sglang) of that Python. Raises EngineMissing where there is none."""
    try:
        done = subprocess.run(
            [python, "-c", PROBE, name], capture_output=True, text=True, timeout=120, env={**os.environ, **SAFE_PATH}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineMissing(f"the Python {python} does not run ({error}): name another with --engine-python.") from None
    if done.returncode != 0:
        raise EngineMissing(f"the Python {python} cannot say what it has installed: {last_line(done.stderr)}")
    found = json.loads(done.stdout)
    if not found["found"]:
        raise EngineMissing(
            f"{python} has no {name}: install it there, or name the Python that has it with --engine-python."
        )
    versions: list[str] = sorted(found["versions"], key=lambda v: "cpu" not in v)
    return Engine(name, python, versions[0] if versions else "unknown", frozenset(found["flags"]), found["m3quant"])


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def version_notes(engine: Engine, family: Family, config: Mapping[str, Any]) -> list[str]:
    """Warnings about this release. Raises EngineMissing where it is too old for the model."""
    release = engine.release
    if engine.name != "vllm":
        return []
    if release is None:
        return [f"vLLM calls itself '{engine.version}': its version was not checked against the checkpoint"]
    if family.min_vllm and release < Version(family.min_vllm):
        raise EngineMissing(
            f"vLLM {engine.version} does not have {family.model_type}: install {family.min_vllm} or newer."
        )
    first, beyond = KNOWN_VLLM
    if not first <= release < beyond:
        return [
            f"vLLM {engine.version} is outside the releases this was written for ({first} to before {beyond}): check what it measures"
        ]
    return []


def check_dtypes(fit: Fit, engine: Engine) -> None:
    """Raise EngineMissing for a cache that this release cannot keep on this GPU.

    0.26's models/minimax_m3/common/indexer.py refuses FP8 index keys off SM100, 0.32's takes them wherever CUDA has FP8.
    """
    release = engine.release
    has_index = fit.model.family.kv_geometry.index_layers > 0
    if (
        engine.name != "vllm"
        or not has_index
        or fit.setup.index_dtype == "bfloat16"
        or fit.node.gpu.generation == "blackwell"
    ):
        return
    if engine.is_cpu or (release is not None and release < FP8_INDEX_ON_HOPPER):
        raise EngineMissing(
            f"vLLM {engine.version} keeps M3's index keys in BF16 on this device: leave --index-dtype out, or install {FP8_INDEX_ON_HOPPER} or newer on a GPU."
        )


def check_integers(engine_name: str, engine: Engine | None, schemes: Collection[Scheme]) -> None:
    """Raise EngineMissing where the engine, or its installed release, does not read integers of these widths."""
    narrow = sorted({scheme.bits for scheme in schemes if is_humming_only(scheme)})
    if not narrow:
        return
    what = f"integers of {' and '.join(map(str, narrow))} bits"
    if engine_name != "vllm":
        raise EngineMissing(
            f"SGLang does not read {what}, only 4 and 8: serve this checkpoint with vLLM {FIRST_VLLM} or newer."
        )
    if engine is not None and engine.release is not None and engine.release < Version(FIRST_VLLM):
        raise EngineMissing(f"vLLM {engine.version} does not read {what}, only 4 and 8: install {FIRST_VLLM} or newer.")


def weight_notes(fit: Fit) -> list[str]:
    """What is known of engines that read weights stored so."""
    found = []
    dtypes = {group.dtype for group in fit.model.groups if group.role == "routed_experts"}
    if "F8_E4M3" in dtypes:
        method = str((fit.model.config.get("quantization_config") or {}).get("quant_method", ""))
        found += fit.model.family.engine_notes([Scheme("fp8", bits=8)], method)
    # Of a checkpoint's config only all schemes together are known; whether the experts have zero points, the tensors say.
    if any(group.role == "routed_experts" and group.leaf == "weight_zero_point" for group in fit.model.groups):
        found += zero_point_notes(fit.model.schemes, "compressed-tensors")
    return [*found, *integer_notes([s for s in fit.model.schemes if is_humming_only(s)])]


def detect_node(engine: Engine) -> Node:
    """The GPUs of this machine as nvidia-smi lists them, as many as CUDA_VISIBLE_DEVICES leaves; the CPU for vLLM's CPU build. Raises NodeError where there is none."""
    if engine.is_cpu:
        return cpu_node(2**30)
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        done = None
    rows = (
        [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line]
        if done and done.returncode == 0
        else []
    )
    if not rows:
        raise NodeError(
            "no GPU was found (nvidia-smi lists none): start where the GPUs are, or ask for a plan with --dry-run --on 1xH200."
        )
    kinds = {name.strip() for name, _ in rows}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        parts = [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
        numbers = [int(part) for part in parts if part.isdigit()]
        rows = [rows[i] for i in numbers if i < len(rows)] if len(numbers) == len(parts) else rows[: len(parts)]
        if not rows:
            raise NodeError("CUDA_VISIBLE_DEVICES hides every GPU: unset it, or name those to use.")
    names = {name.strip() for name, _ in rows}
    # Unless told otherwise CUDA numbers the fastest first, nvidia-smi goes by the bus: among unlike GPUs a number names two.
    if len(names) > 1 or (len(kinds) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"):
        raise NodeError(
            f"the GPUs differ ({', '.join(sorted(kinds))}): choose equal ones by nvidia-smi's numbers, with "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID and CUDA_VISIBLE_DEVICES."
        )
    size = rows[0][1].strip()
    return Node(len(rows), gpu_called(names.pop(), int(size) if size.isdigit() else None))


def gpu_called(name: str, mib: int | None) -> Gpu:
    """The known GPU of an nvidia-smi name, or one of its memory less what the driver keeps (0.5 %, as on H100 and H200).

    mib is None where nvidia-smi says [N/A], as for GB10, whose memory is the host's. Raises NodeError if the name is unknown too.
    """
    flat = name.upper().replace(" ", "")
    for gpu in GPUS.values():
        if gpu.name in flat and (mib is None or abs(gpu.total_bytes / 2**20 / mib - 1) < 0.05):
            return gpu
    if mib is None:
        raise NodeError(
            f"nvidia-smi does not tell the memory of {name}: plan for its GiB with --dry-run --on, as 1x95.5GiB."
        )
    return Gpu(name, int(mib * 2**20 * 0.995), 0.0, "nvidia-smi", "unknown")


@dataclass(frozen=True)
class Launch:
    """A command ready to run. env: what is added to the environment, secrets among it under `secret` names; notes: said to the user."""

    command: list[str]
    env: dict[str, str]
    secret: frozenset[str]
    notes: list[str]


def vllm_launch(fit: Fit, recipe: ServeRecipe, engine: Engine | None, api_key: str | None, pin: int | None) -> Launch:
    """`vllm serve` for a verdict that fits. engine None: a release that is not here, so every flag of 0.33 is used.

    Raises EngineMissing where the installed engine lacks a flag that the checkpoint or the guard needs.
    """
    needed = [fit.model.where, *vllm_arguments(fit), "--host", recipe.host, "--port", str(recipe.port)]
    if recipe.served_name:
        needed += ["--served-model-name", recipe.served_name]
    if pin is not None:
        needed += ["--kv-cache-memory-bytes", str(pin)]
    env, secret, notes = dict[str, str](), set[str](), list[str]()
    if recipe.guard:
        needed += ["--middleware", GUARD]
        env |= guard_environment(recipe)
    if api_key is not None:
        names = ("VLLM_API_KEY", "M3QUANT_GUARD_API_KEYS") if recipe.guard else ("VLLM_API_KEY",)
        env |= dict.fromkeys(names, api_key)
        secret |= set(names)
    optional = [("--shutdown-timeout", str(recipe.shutdown_timeout)), ("--watermark", f"{recipe.watermark:g}")]
    if engine is not None:
        missing = [flag for flag in needed if flag.startswith("--") and not engine.takes(flag)]
        if missing:
            raise EngineMissing(
                f"vLLM {engine.version} does not know {', '.join(missing)}, which this checkpoint or the guard needs: install a newer one."
            )
        for flag, _ in optional:
            if not engine.takes(flag):
                notes.append(f"vLLM {engine.version} does not know {flag}: left out")
        optional = [pair for pair in optional if engine.takes(pair[0])]
    if fit.node.gpu.name == CPU:
        env["VLLM_CPU_KVCACHE_SPACE"] = f"{fit.node.gpu.total_bytes / 2**30:g}"
    env.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", str(recipe.start_timeout))
    program = ["vllm", "serve"] if engine is None else [engine.python, "-m", "vllm.entrypoints.cli.main", "serve"]
    arguments = [*needed, *(part for pair in optional for part in pair), *recipe.extra]
    return Launch([*program, *arguments], env, frozenset(secret), notes)


def guard_environment(recipe: ServeRecipe) -> dict[str, str]:
    """The guard's variables. Raises RecipeError for a key in the recipe, GuardError for what the guard would refuse once all weights are loaded."""
    env = {f"{PREFIX}{name.upper()}": str(value) for name, value in recipe.guard_settings.items()}
    if f"{PREFIX}API_KEYS" in env:  # not repeated here: commands, recipes and the files for other managers are shown
        raise RecipeError(
            "guard_settings holds API keys, which would be printed: name their variable with --api-key-env."
        )
    env.setdefault(f"{PREFIX}WATERMARK", f"{recipe.watermark:g}")
    read_settings({**os.environ, **env})
    return env


def sglang_launch(fit: Fit, recipe: ServeRecipe, engine: Engine | None, api_key_env: str | None) -> Launch:
    """The same choices for SGLang. Its pool is set by --mem-fraction-static, which counts weights and cache but no activations."""
    setup, rank = fit.setup, fit.prediction.tightest
    fraction = (rank.requested - rank.activation.high - rank.graphs.high) / rank.total
    command = [engine.python if engine else "python3", "-m", "sglang.launch_server", "--model-path", fit.model.where]
    command += ["--host", recipe.host, "--port", str(recipe.port), "--context-length", str(fit.context)]
    command += ["--tp-size", str(setup.split.tp), "--max-running-requests", str(setup.max_num_seqs)]
    command += ["--chunked-prefill-size", str(setup.max_num_batched_tokens), "--mem-fraction-static", f"{fraction:.3f}"]
    if setup.split.pp > 1:
        command += ["--pp-size", str(setup.split.pp)]
    if setup.split.expert_parallel:
        command += ["--ep-size", str(setup.split.tp)]
    if setup.kv_dtype.startswith("fp8"):
        command += ["--kv-cache-dtype", {"fp8": "fp8_e4m3"}.get(setup.kv_dtype, setup.kv_dtype)]
    command += [*fit.model.family.sglang_flags, *recipe.extra]
    notes = ["SGLang has no m3quant guard: put a limit on prompt and max_tokens in front of it, or use vLLM"]
    if api_key_env:
        notes.append(
            f"SGLang takes its API key only as an argument: add --api-key with the value of {api_key_env}, where other users cannot list processes"
        )
    if setup.index_dtype != "bfloat16":
        notes.append("SGLang's index cache dtype was not set: its flag is not known here")
    return Launch(command, {}, frozenset(), notes)


def shown(launch: Launch, quote: Any, api_key_env: str | None) -> str:
    """The command as a shell line, with the environment before it; the key as the variable that the user named."""
    env: Sequence[str] = [
        f"{name}=${api_key_env}" if name in launch.secret else f"{name}={quote(value)}"
        for name, value in launch.env.items()
    ]
    return " ".join([*env, *(quote(part) for part in launch.command)])
