"""The AWQ search on one GPU: kernels against their references and floors, one layer by stage.

    python -m tests.benchmarks.awq_gpu OUT [--mode kernels|same|layer-m2|layer-m3 ...]

Writes OUT/awq_gpu.json after every section; a section that fails leaves its traceback there and the next one runs.
kernels: every Triton kernel on fresh random data at real-width slices, error against the plain form in float32 on the same
GPU, seconds against the floor. same: a whole layer's search by the GPU's path and by the reference. layer-*: stages of
`calibrate_layer` on random weights of a release's shapes, 128 x 512 tokens. Whole conversions are tests.benchmarks.convert's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from m3quant.calibration import awq, awq_attention, awq_mlp, glu, grouped, kernels, ranges, round_weight, rounding
from m3quant.calibration.awq_settings import AwqSettings
from m3quant.calibration.layers import Layer, layer_shapes, layer_spec
from m3quant.calibration.ops import Activation, gated, grouped_linear
from m3quant.calibration.ranges import COARSE_FACTORS, FACTORS
from m3quant.schemes import parse_scheme

from .wide import wide_config

HBM = 4.3e12  # bytes/s read and written, measured on an H200 by a device-to-device copy
FP32_ISSUE = 132 * 128 * 1.98e9  # float32 instructions a second: SMs x lanes x clock
M2, M3 = "m2", "m3"  # shapes of minimax-m2.7 and minimax-m3
Section = Callable[[], Any]


def seconds(work: Callable[[], Any], repeat: int = 5) -> float:
    """Median seconds of `work` on the GPU."""
    work()
    times = []
    for _ in range(repeat):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[repeat // 2]


def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def check_rounding() -> list[dict[str, Any]]:
    rows = []
    shapes = [("int4-g128", 3, 1536, 3072), ("int4-g128", 2, 6144, 3072), ("int4-g32", 2, 1536, 3072)]
    shapes += [("int4-g32-asym", 2, 384, 1024), ("int8-g64", 2, 384, 1024), ("int4-g128-asym", 2, 100, 256)]
    for name, experts, n, k in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            scheme, weight = parse_scheme(name), randn(experts, n, k, scale=0.02, dtype=dtype)
            weight[0, 0] = 0
            column, row = torch.exp(randn(1, k) * 0.3), torch.exp(randn(experts, n) * 0.3)
            moment = torch.exp(randn(experts, k))
            args = (weight, scheme, column, row, moment)
            with reference_only():
                expected = round_weight.reference(*args, None)
            acting, shrink, before, after = kernels.round_groups(*args, FACTORS, errors=True)
            assert acting is not None and shrink is not None and before is not None and after is not None
            given = kernels.round_groups(weight, scheme, column, row, shrink=expected.shrink)[0]
            assert given is not None and expected.shrink is not None
            rows.append(
                {
                    "scheme": name, "shape": [experts, n, k], "dtype": str(dtype),
                    "factors_equal": float((shrink == expected.shrink).float().mean()),
                    "given_range_bit_equal": bool(torch.equal(given, expected.acting)),
                    "given_range_differing": float((given != expected.acting).float().mean()),
                    "before_relative": abs(float(before.sum(dtype=torch.float64)) / expected.before - 1),
                    "after_relative": abs(float(after.sum(dtype=torch.float64)) / expected.after - 1),
                }
            )  # fmt: skip
    return rows


def check_gate() -> list[dict[str, Any]]:
    rows = []
    for act in (Activation(), Activation("swigluoai")):
        gate, up = randn(3, 1000, 1536, scale=3), randn(3, 1000, 1536, scale=3)
        expected = gated(gate.double(), up.double(), act)
        rows.append({"activation": act.kind, "relative": relative(kernels.gate_rows(gate, up, act), expected)})
    return rows


def time_rounding() -> list[dict[str, Any]]:
    """At 64 experts of M2's w1: fine and coarse search, rounding alone; tiles and warps; against bytes and instructions."""
    scheme, weight = parse_scheme("int4-g128"), randn(64, 1536, 3072, scale=0.02, dtype=torch.bfloat16)
    column, moment = torch.exp(randn(1, 3072) * 0.3), torch.exp(randn(64, 3072))
    count = weight.numel()
    cases = {
        "search 28 factors, write": (FACTORS, True),
        "search 28 factors": (FACTORS, False),
        "search 4 factors, write": (COARSE_FACTORS, True),
        "round, write": (None, True),
    }
    rows = []
    for tile, warps in ((4096, 4), (4096, 8), (2048, 4), (2048, 2), (1024, 2)):
        with replaced(kernels, _TILE=tile), replaced(kernels, _WARPS=warps):
            for case, (factors, acting) in cases.items():
                second = moment if factors else None
                run = lambda f=factors, m=second, a=acting: kernels.round_groups(  # noqa: E731
                    weight, scheme, column, moment=m, factors=f, acting=a, tf32=True
                )
                took = seconds(run)
                tried = 1 + len(factors or ())
                bytes_floor = (2 + 4 * acting) * count / HBM
                work_floor = count * tried * 8 / FP32_ISSUE
                rows.append({"case": case, "tile": tile, "warps": warps, "ms": took * 1e3, "bytes_floor_ms": bytes_floor * 1e3, "instruction_floor_ms": work_floor * 1e3})  # fmt: skip
    return rows


def time_products() -> list[dict[str, Any]]:
    """TF32 and BF16 batched products at the search's and the forward's shapes, in TFLOP/s."""
    rows = []
    for label, experts, n, k, m in (("M2 w1", 64, 1536, 3072, 256), ("M2 w2", 64, 3072, 1536, 256), ("M3 w1", 18, 3072, 6144, 256), ("M2 w1, many rows", 64, 1536, 3072, 512)):  # fmt: skip
        x, w = randn(experts, m, k), randn(experts, n, k)
        flops = 2 * experts * m * n * k
        rows.append({"product": f"{label}, TF32 bmm", "rows": m, "tflops": flops / seconds(lambda x=x, w=w: grouped.times(x, w)) / 1e12})  # fmt: skip
        rows.append({"product": f"{label}, float32 bmm", "rows": m, "tflops": flops / seconds(lambda x=x, w=w: grouped.times(x, w, True)) / 1e12})  # fmt: skip
        counts = torch.full((experts,), m, device="cuda")
        flat, b = x.flatten(0, 1).bfloat16(), w.bfloat16()
        rows.append({"product": f"{label}, BF16 grouped", "rows": m, "tflops": flops / seconds(lambda f=flat, b=b, c=counts: grouped_linear(f, b, c)) / 1e12})  # fmt: skip
        error = relative(grouped.times(x[:1].bfloat16().float(), w[:1].bfloat16().float()), torch.bmm(x[:1].bfloat16().double(), w[:1].bfloat16().double().transpose(1, 2)))  # fmt: skip
        rows.append({"product": f"{label}, TF32 on BF16 values, relative error", "relative": error})
    return rows


@contextlib.contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Plain steps in place of the kernels, float32 in place of TF32, unit by unit in place of batches."""
    made = glu.GluBlock.__init__

    def plain(self: glu.GluBlock, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.grouped, self.stacks = False, None

    no = lambda *_: False  # noqa: E731
    exact = lambda x, w, exact=True: torch.bmm(x, w.transpose(1, 2))  # noqa: E731
    plain_gate = lambda x, g, u, act, exact=True: gated(torch.bmm(x, g.transpose(1, 2)), torch.bmm(x, u.transpose(1, 2)), act)  # noqa: E731  # fmt: skip
    with (
        replaced(ranges, fused=no), replaced(round_weight, fused=no), replaced(glu.GluBlock, __init__=plain),
        replaced(rounding, times=exact, gated_rows=plain_gate), replaced(glu, _CHUNK={"cpu": 1 << 21, "cuda": 1 << 27}),
    ):  # fmt: skip
        yield


def random_layer(release: str, **smaller: int) -> tuple[Any, dict[str, torch.Tensor]]:
    config = wide_config(release, 1)
    config.get("text_config", config).update(smaller)
    spec = layer_spec(config, 0)
    tensors = {}
    for name, shape in layer_shapes(spec).items():
        tensor = randn(*shape)
        tensor = tensor * 0.1 + 1 if len(shape) == 1 else tensor / shape[-1] ** 0.5
        tensors[name] = tensor.to(torch.float32 if "gate.weight" in name or "bias" in name else torch.bfloat16)
    return spec, tensors


def salient(windows: int, length: int, hidden: int) -> torch.Tensor:
    size = torch.exp(randn(hidden) * 0.7)
    size[torch.randperm(hidden, device="cuda")[:8]] *= 15
    return (randn(windows, length, hidden) * size).bfloat16()


def experts_int(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {n: parse_scheme("int4-g128") for n in tensors if ".experts." in n}


def compare_layer() -> list[dict[str, Any]]:
    """The same small layer (real shapes, fewer experts) through both paths: chosen ratio, losses, block errors."""
    rows = []
    for release, smaller in ((M2, {"num_local_experts": 16, "num_experts_per_tok": 4}), (M3, {"num_local_experts": 8, "num_experts_per_tok": 2})):  # fmt: skip
        spec, tensors = random_layer(release, **smaller)
        x = salient(16, 512, spec.hidden_size)
        settings = AwqSettings(search_tokens=4096)
        run = lambda s=spec, t=tensors, x=x, a=settings: awq.calibrate_layer(s, t, experts_int(t), x, a, "cuda")  # noqa: E731  # fmt: skip
        started = time.perf_counter()
        found = run()
        torch.cuda.synchronize()
        quick = time.perf_counter() - started
        again = run()
        with reference_only():
            started = time.perf_counter()
            expected = run()
            torch.cuda.synchronize()
            slow = time.perf_counter() - started
        a, b = found.log["blocks"][1], expected.log["blocks"][1]
        one, two = a["groups"][0], b["groups"][0]
        losses = [abs(p[1] / q[1] - 1) for p, q in zip(one["losses"], two["losses"], strict=True)]
        same = [float((found.shrink[n] == expected.shrink[n]).float().mean()) for n in found.shrink]
        rows.append(
            {
                "release": release, "seconds": quick, "reference_seconds": slow,
                "ratio": [one["ratio"], two["ratio"]], "chosen": [a["chosen"], b["chosen"]],
                "largest_relative_loss_difference": max(losses),
                "block_error": {k: [v, b["block_error"][k], v / b["block_error"][k] - 1] for k, v in a["block_error"].items()},
                "factors_equal": sum(same) / len(same), "pairs": [a.get("pair"), b.get("pair")],
                "deterministic": found.log | {"seconds": 0} == again.log | {"seconds": 0},
            }
        )  # fmt: skip
        del spec, tensors, x, found, expected, again
        torch.cuda.empty_cache()
    return rows


class Stages:
    """Seconds by function, with the GPU waited for before and after: nested ones are inside their callers."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._undo: list[tuple[Any, str, Any]] = []

    def watch(self, owner: Any, name: str, label: str | None = None) -> None:
        plain = getattr(owner, name)
        key = label or f"{getattr(owner, '__name__', owner)}.{name}"

        def timed(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.synchronize()
            started = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                torch.cuda.synchronize()
                self.seconds[key] += time.perf_counter() - started
                self.calls[key] += 1

        self._undo.append((owner, name, plain))
        setattr(owner, name, timed)

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, plain in self._undo:
            setattr(owner, name, plain)

    def table(self) -> dict[str, list[float]]:
        return {key: [round(value, 4), self.calls[key]] for key, value in sorted(self.seconds.items(), key=lambda p: -p[1])}  # fmt: skip


def watched() -> Stages:
    stages = Stages()
    stages.watch(Layer, "__init__", "Layer")
    stages.watch(awq_attention.AttentionSearch, "run", "attention search")
    stages.watch(awq_attention.AttentionSearch, "mlp_inputs", "mlp inputs")
    stages.watch(awq, "_assign", "route and assign")
    stages.watch(awq_mlp.MlpSearch, "__init__", "mlp search set-up")
    stages.watch(awq_mlp.MlpSearch, "_search_norm", "scale search")
    stages.watch(awq_mlp, "weight_mean", "weight_mean")
    stages.watch(awq_mlp.MlpSearch, "_variant", "variants")
    stages.watch(rounding.Rounder, "_try_pair", "pair search")
    stages.watch(rounding.Rounder, "_best_pair", "pair search: ratios")
    stages.watch(rounding.Rounder, "_padded_rows", "pair search: rows")
    stages.watch(rounding.Rounder, "_round", "variants: round")
    stages.watch(rounding.Rounder, "_input_moment", "variants: input moments")
    stages.watch(rounding.Rounder, "_down_moment", "variants: down moments")
    stages.watch(awq_mlp, "round_weight", "scale search: round")
    stages.watch(glu._GroupedOutput, "add", "outputs")
    stages.watch(glu._GroupedOutput, "total", "outputs: sum")
    stages.watch(awq_mlp, "squared_error", "losses")
    return stages


def layer_stages(release: str) -> dict[str, Any]:
    spec, tensors = random_layer(release)
    x = salient(128, 512, spec.hidden_size)
    settings = AwqSettings()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    result: dict[str, Any] = {"release": release, "layer_bytes": sum(t.nbytes for t in tensors.values()), "plain": []}
    for _ in range(2):  # the first compiles the kernels
        started = time.perf_counter()
        found = awq.calibrate_layer(spec, tensors, experts_int(tensors), x, settings, "cuda")
        torch.cuda.synchronize()
        result["plain"].append(time.perf_counter() - started)
        print(result["plain"], flush=True)
    result["peak_above_inputs"] = torch.cuda.max_memory_allocated() - base
    result["chosen"] = [block["chosen"] for block in found.log["blocks"]]
    result["ratio"] = [block["groups"] and block["groups"][0]["ratio"] for block in found.log["blocks"]]
    with watched() as stages:
        awq.calibrate_layer(spec, tensors, experts_int(tensors), x, settings, "cuda")
    result["stages"] = stages.table()
    moe = spec.moe
    assert moe is not None
    pairs, matrix = moe.top_k, spec.hidden_size * moe.intermediate_size
    tokens = x.shape[0] * x.shape[1]
    result["floors"] = {
        "one stream's experts, BF16": 6 * tokens * pairs * matrix / 636e12,
        "scale search products, TF32 at 300": 21 * 6 * settings.search_tokens * pairs * matrix / 300e12,
        "down moments of two variants, TF32 at 300": 2 * 4 * tokens * pairs * matrix / 300e12,
        "scale search rounding": 21 * 5 * 2 * moe.num_experts * matrix * 8 / FP32_ISSUE,
        "range search of two variants": 2 * 29 * 3 * moe.num_experts * matrix * 8 / FP32_ISSUE,
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mode", nargs="+", default=["kernels", "same", "layer-m2"])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sections: dict[str, dict[str, Section]] = {
        "kernels": {
            "round_groups": check_rounding, "gate_rows": check_gate,
            "round_groups_time": time_rounding, "products": time_products,
        },
        "same": {"layer_against_reference": compare_layer},
        "layer-m2": {"layer_m2": lambda: layer_stages(M2)},
        "layer-m3": {"layer_m3": lambda: layer_stages(M3)},
    }  # fmt: skip
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for mode in arguments.mode:
        for name, section in sections[mode].items():
            started = time.perf_counter()
            try:
                result[name] = section()
            except Exception:
                result[name] = {"failed": traceback.format_exc()[-3000:]}
            took = time.perf_counter() - started
            print(f"== {name} ({took:.1f} s)", flush=True)
            for row in result[name] if isinstance(result[name], list) else [result[name]]:
                print(json.dumps(row, default=str) if "failed" not in row else row["failed"], flush=True)
            torch.cuda.empty_cache()
            (arguments.out / "awq_gpu.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    if any(isinstance(v, dict) and "failed" in v for v in result.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
