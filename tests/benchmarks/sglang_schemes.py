"""Which scheme SGLang's own code finds for every module of m3quant's outputs. CUDA is faked, nothing is computed.

    pip download --no-deps sglang==0.5.23 && unzip sglang-*.whl -d SGLANG
    python -m tests.benchmarks.sglang_schemes SGLANG --python PYTHON --out FILE.json

PYTHON has torch, transformers and compressed-tensors (vLLM's environment, for instance). What else SGLang imports and PYTHON lacks is a stub.
Of each output, the quantization_config that m3quant writes for tiny-m2 and tiny-m3 goes through CompressedTensorsConfig.from_config,
get_linear_scheme and get_moe_scheme, with the names that SGLang's models give their modules. Also read from the source: whether the kernel that is
chosen for the experts is handed M3's activation (gemm1_alpha). A module that is stored quantized and finds no scheme is an error too.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPES = ("awq", "awq-fp8", "awq-attn-bf16", "awq-all-int4", "awq-g32", "int4", "fp8", "fp8-block")
TWO_BITS = {
    "routed_experts": "int2-g128-asym",
    "attention": "int8-g128",
    "shared_experts": "int8-g128",
    "dense_mlp": "int8-g128",
}
MODELS = {"tiny-m2": "minimax_m2.py", "tiny-m3": "minimax_m3_vl.py"}
SCHEMES = "srt/layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16_moe.py"
LIMIT_S = 600  # imports alone take a minute
STUBS = ("orjson", "IPython", "sgl_kernel", "gguf")  # what vLLM's environment lacks; more are found one by one


def prepare() -> list[dict[str, Any]]:
    """The outputs: model, recipe, quantization_config, and whether the model's experts have M3's activation."""
    from m3quant.checkpoint import Checkpoint
    from m3quant.errors import PlanError
    from m3quant.planning.plan import make_plan
    from m3quant.recipe.recipe import build_recipe, named_recipe
    from tests.support.paths import FIXTURES

    found: list[dict[str, Any]] = []
    for model in MODELS:
        checkpoint = Checkpoint.open(FIXTURES / model)
        recipes = {name: named_recipe(name) for name in RECIPES}
        recipes["2 bits"] = {"rounding": "feedback", "calibration": "text", "schemes": TWO_BITS}
        for name, document in recipes.items():
            try:
                plan = make_plan(checkpoint, build_recipe(document))
            except PlanError as error:
                found.append({"model": model, "recipe": name, "refused": str(error)})
                continue
            if plan.quantization and plan.quantization["quant_method"] == "compressed-tensors":
                found.append({"model": model, "recipe": name, "quantization": plan.quantization})
            else:
                found.append(
                    {
                        "model": model,
                        "recipe": name,
                        "refused": "not compressed-tensors: SGLang's Fp8Config, not looked at here",
                    }
                )
    return found


def modules(model: str) -> list[tuple[str, str]]:
    """(name, class) of the quantizable modules of one layer of each kind, as SGLang's model names them."""
    root, mlp = ("model", "block_sparse_moe") if model == "tiny-m2" else ("language_model.model", "mlp")
    layer = f"{root}.layers.1"
    out = [
        (f"{layer}.self_attn.qkv_proj", "QKVParallelLinear"),
        (f"{layer}.self_attn.o_proj", "RowParallelLinear"),
        (f"{layer}.{mlp}.experts", "FusedMoE"),
    ]
    if model == "tiny-m3":
        out += [(f"{layer}.self_attn.index_qkv_proj", "QKVParallelLinear")]
        for where in (f"{layer}.mlp.shared_experts", f"{root}.layers.0.mlp"):
            out += [
                (f"{where}.gate_up_proj", "MergedColumnParallelLinear"),
                (f"{where}.down_proj", "RowParallelLinear"),
            ]
    return out  # fmt: skip


def attribute(path: Path, name: str) -> Any:
    """The value of a class attribute that is a literal."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return ast.literal_eval(node.value)
    raise SystemExit(f"{path} has no {name}: SGLang's models are written otherwise in this release.")


def hands_over_alpha(folder: Path, scheme: str) -> bool:
    """Whether the class of that name, or the runner that it makes, is given gemm1_alpha."""
    tree = ast.parse((folder / "sglang" / SCHEMES).read_text(encoding="utf-8"))
    source = next(ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == scheme)
    return "gemm1_alpha" in source or "MoeRunnerBackend.TRITON" in source


CHILD = """
import importlib.abc, importlib.machinery, json, sys, types
from unittest.mock import MagicMock

work = json.load(sys.stdin)
class Stub(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in work["stubs"] else None
    def create_module(self, spec):
        return Stub(spec.name)
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Finder())
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *a: (9, 0)
torch.cuda.get_device_name = lambda *a: "NVIDIA H200"
torch.cuda.current_device = lambda: 0
torch.cuda.device_count = lambda: 1
torch.version.cuda = "13.0"
card = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=140 << 30, multi_processor_count=132,
                             shared_memory_per_block_optin=232448, warp_size=32, L2_cache_size=50 << 20)
torch.cuda.get_device_properties = lambda *a: card
from transformers import AutoConfig
register = AutoConfig.register  # a newer transformers than SGLang was written for has some of its models itself
AutoConfig.register = staticmethod(lambda *a, **k: register(*a, **{**k, "exist_ok": True}))
import sglang.version
import sglang.srt.layers.quantization.compressed_tensors.compressed_tensors as ct
from sglang.srt.layers.moe.utils import MoeRunnerBackend

def look(config, mapping, name, kind, backend):
    ct.get_moe_runner_backend = lambda: MoeRunnerBackend(backend)
    config = ct.CompressedTensorsConfig.from_config(json.loads(json.dumps(config)))
    config.packed_modules_mapping = mapping
    layer = type(kind, (torch.nn.Module,), {})()
    try:
        find = config.get_moe_scheme if kind == "FusedMoE" else config.get_linear_scheme
        scheme = find(layer, name)
    except Exception as error:
        return {"error": " ".join(map(str, error.args)).replace("  ", " ")[:300] or type(error).__name__}
    return {"scheme": type(scheme).__name__ if scheme is not None else None}

answers = []
for output in work["outputs"]:
    rows = {}
    for name, kind in output["modules"]:
        backends = ("auto", "triton") if kind == "FusedMoE" else ("auto",)
        for backend in backends:
            key = name if backend == "auto" else name + " (triton)"
            rows[key] = look(output["quantization"], output["mapping"], name, kind, backend)
    answers.append(rows)
print("ANSWER" + json.dumps({"version": sglang.version.__version__, "answers": answers}))
"""


def ask(folder: Path, python: str, outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """The child's answer; each module that is missing there becomes a stub in turn."""
    stubs = list(STUBS)
    while True:
        done = subprocess.run(
            [python, "-c", CHILD], input=json.dumps({"stubs": stubs, "outputs": outputs}), capture_output=True, text=True, timeout=LIMIT_S,
            env={**os.environ, "PYTHONPATH": str(folder)},
        )  # fmt: skip
        if found := [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]:
            return dict(json.loads(found[-1].removeprefix("ANSWER")), stubs=stubs)
        missing = done.stderr.rpartition("No module named '")[2].partition("'")[0].partition(".")[0]
        if not missing or missing in stubs:
            raise SystemExit(done.stderr[-3000:])
        stubs.append(missing)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an unpacked wheel of SGLang")
    parser.add_argument("--python", required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    outputs = prepare()
    asked = [output for output in outputs if "quantization" in output]
    for output in asked:
        output["modules"] = modules(output["model"])
        output["mapping"] = attribute(
            options.folder / "sglang" / "srt" / "models" / MODELS[output["model"]], "packed_modules_mapping"
        )
    answer = ask(options.folder.resolve(), options.python, asked)
    for output, rows in zip(asked, answer["answers"], strict=True):
        output["found"] = rows
        del output["modules"], output["quantization"]
        chosen = {
            row["scheme"]
            for name, row in rows.items()
            if ".experts" in name and "shared" not in name and row.get("scheme")
        }
        output["hands_over_alpha"] = {s: hands_over_alpha(options.folder, s) for s in sorted(chosen) if "WNA16" in s}
    result = {"sglang": answer["version"], "stubs": answer["stubs"], "outputs": outputs}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    for output in outputs:
        print(output["model"], output["recipe"])
        for name, row in output.get("found", {}).items():
            print("   ", name, row.get("scheme") or row.get("error") or "no scheme: taken as unquantized")
        for scheme, hands in output.get("hands_over_alpha", {}).items():
            print("    ", scheme, "is given gemm1_alpha" if hands else "is not given gemm1_alpha")
        if "refused" in output:
            print("   ", output["refused"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
