"""What gradient steps on a rounded layer's float parameters are worth after error feedback: KL divergence on the fixtures.

    python -m tests.benchmarks.float_refit OUT [--bits 2 3 4] [--model tiny-m2 tiny-m3] [--device cuda]
    python -m tests.benchmarks.float_refit OUT --table      # OUT/float_refit.json as the table of docs/fit.md

Codes stay as feedback made them. Adam then lowers the squared error of the layer's output against the source stream's over
the calibration windows, in float32, by moving one set of parameters that the output stores unquantized:

scales     of every routed expert and of the shared or dense MLP
norm       the weight of the norm that they read
router     the router's weight; who is chosen follows it
scales, norm, router    all of them

The last eighth of the calibration windows takes no part in the steps; the parameters of the step with the least error on it are
kept, those before the first step included. Parameters are rounded to BF16 as they are stored. Text, windows and KL are those of
rounding_ablation: experts in groups of 128, asymmetric at 2 bits, INT8 around, own text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m3quant.calibration import ops
from m3quant.calibration.layers import Layer
from m3quant.calibration.ops import Routing
from m3quant.calibration.quantized_layer import QuantizedLayer, StoredWeight
from m3quant.calibration.stream import HiddenStates
from m3quant.families.spec import MLP_NORM, always_on_names, expert_names

from .rounding_ablation import EVERYTHING, EXPERTS, INT8, MICRO_BATCH, Model, divergences

SCHEMES = {2: "int2-g128-asym", 3: "int3-g128", 4: "int4-g128"}
SETS = {
    "feedback": (),
    "scales": ("scales",),
    "norm": ("norm",),
    "router": ("router",),
    "scales, norm, router": ("scales", "norm", "router"),
}
PASSES = 4  # over the windows, by default
RATE = {"scales": 1e-3, "norm": 1e-3, "router": 1e-4}  # of Adam; scales are moved by factors
HELD_OUT = 8


class Block:
    """The feed-forward block of a rounded layer as a differentiable function of its float parameters."""

    def __init__(self, layer: Layer, found: QuantizedLayer, wanted: tuple[str, ...]) -> None:
        self.layer, self.spec, self.wanted = layer, layer.spec, wanted
        moe = self.spec.moe
        self.units = [*expert_names(self.spec)]
        always_on = always_on_names(self.spec)
        self.always_on = always_on
        names = [name for unit in [*self.units, *([always_on] if always_on else [])] for name in unit]
        self.stored = {name: found.weights[name] for name in names}
        self.factors = {name: torch.ones_like(stored.scale) for name, stored in self.stored.items()}
        self.norm = layer.weight(MLP_NORM).float().clone()
        self.router = layer.weight(moe.router_name).float().clone() if moe else None
        self.bias = layer.weight(moe.bias_name) if moe and moe.use_bias else None
        for tensor in self.parameters():
            tensor.requires_grad_()

    def groups(self) -> Iterator[tuple[str, list[torch.Tensor]]]:
        if "scales" in self.wanted:
            yield "scales", list(self.factors.values())
        if "norm" in self.wanted:
            yield "norm", [self.norm]
        if "router" in self.wanted and self.router is not None:
            yield "router", [self.router]

    def parameters(self) -> list[torch.Tensor]:
        return [tensor for _, tensors in self.groups() for tensor in tensors]

    def weight(self, name: str) -> torch.Tensor:
        stored = self.stored[name]
        if "scales" not in self.wanted:
            return stored.dequantized()
        return StoredWeight(stored.codes, torch.ones_like(stored.scale), stored.zero_point).dequantized() * (
            stored.scale * self.factors[name]
        ).repeat_interleave(stored.codes.shape[-1] // stored.scale.shape[-1], dim=-1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output [T, H] for rows after attention [T, H]."""
        h = ops.rms_norm(x, self.norm, self.spec.eps, self.spec.norm_one_plus)
        out, moe = x, self.spec.moe
        if moe is not None:
            assert self.router is not None
            routing = ops.route(
                h, self.router, self.bias, moe.top_k, moe.routed_scaling, kind=moe.router, normalise=moe.normalise
            )
            out = out + self._experts(h, routing)
        if self.always_on is not None:
            gate, up, down = (self.weight(name) for name in self.always_on)
            out = out + ops.glu_mlp(h, gate, up, down, self.spec.activation)
        return out

    def _experts(self, h: torch.Tensor, routing: Routing) -> torch.Tensor:
        assert self.spec.moe is not None
        out = torch.zeros_like(h)
        for expert, names in enumerate(self.units):
            tokens, slots = (routing.experts == expert).nonzero(as_tuple=True)
            gate, up, down = (self.weight(name) for name in names)
            own = ops.glu_mlp(h[tokens], gate, up, down, self.spec.moe.activation)
            out = out.index_add(0, tokens, own * routing.weights[tokens, slots, None])
        return out

    @torch.no_grad()
    def store(self) -> None:
        """Put the parameters into the layer, in the dtype that they are stored in."""
        for name, stored in self.stored.items():
            scale = (stored.scale * self.factors[name]).to(torch.bfloat16).float()
            stored.scale = scale
            self.layer.set_weight(name, stored.dequantized().to(torch.bfloat16))
        self.layer.set_weight(MLP_NORM, self.norm.to(self.layer.weight(MLP_NORM).dtype))
        if self.spec.moe is not None and self.router is not None:
            name = self.spec.moe.router_name
            self.layer.set_weight(name, self.router.to(self.layer.weight(name).dtype))


def refit(
    layer: Layer,
    found: QuantizedLayer,
    taught: HiddenStates,
    target: torch.Tensor,
    wanted: tuple[str, ...],
    passes: int,
    rate: float,
) -> None:
    """Move the parameters of a rounded layer so that its output comes nearer to target [S, L, H]. rate: times RATE."""
    block = Block(layer, found, wanted)
    if not block.parameters():
        return
    with torch.no_grad():
        parts = torch.split(taught.read(slice(None), layer.device), MICRO_BATCH)
        mid = torch.cat([x + layer.attention(layer.attention_input(x)).to(x.dtype) for x in parts])
    learnt = max(1, len(mid) - len(mid) // HELD_OUT)
    optimiser = torch.optim.Adam([{"params": tensors, "lr": RATE[name] * rate} for name, tensors in block.groups()])
    batches = list(torch.split(torch.arange(learnt, device=mid.device), max(1, MICRO_BATCH // 4)))
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, passes * len(batches))

    def loss(windows: torch.Tensor | slice) -> torch.Tensor:
        short = block(mid[windows].flatten(0, 1)) - target[windows].flatten(0, 1)
        return short.square().mean()

    @torch.no_grad()
    def judged() -> float:
        held_out = torch.split(torch.arange(learnt, len(mid), device=mid.device), MICRO_BATCH)
        return sum(float(loss(part)) * len(part) for part in held_out)

    best, kept = judged(), [tensor.detach().clone() for tensor in block.parameters()]
    for number in range(passes * len(batches)):
        optimiser.zero_grad()
        loss(batches[number % len(batches)]).backward()
        optimiser.step()
        schedule.step()
        if (number + 1) % max(1, len(batches) // 2) == 0 and (now := judged()) < best:
            best, kept = now, [tensor.detach().clone() for tensor in block.parameters()]
    with torch.no_grad():
        for tensor, value in zip(block.parameters(), kept, strict=True):
            tensor.copy_(value)
    block.store()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", nargs="+", type=int, default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--model", nargs="+", default=["tiny-m2", "tiny-m3"])
    parser.add_argument("--windows", type=int, default=EVERYTHING, help="of calibration text")
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--rate", type=float, default=1.0, help="times the default step sizes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--table", action="store_true", help="print OUT/float_refit.json as Markdown and do nothing else"
    )
    options = parser.parse_args()
    path = options.out / "float_refit.json"
    if options.table:
        found = json.loads((options.out if options.out.is_file() else path).read_text())
        print(table(found["rows"] if isinstance(found, dict) else found))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for model in (Model(name, torch.device(options.device)) for name in options.model):
        text = model.text("own", options.windows)
        for bits in options.bits:
            for label, wanted in SETS.items():
                more = {"wanted": wanted, "passes": options.passes, "rate": options.rate}
                after = partial(refit, **more) if wanted else None
                found = divergences(model, EXPERTS[SCHEMES[bits]], INT8, "feedback", text, after=after)
                rows.append(
                    {
                        "model": model.name,
                        "bits": bits,
                        "moved": label,
                        "passes": options.passes,
                        "rate": options.rate,
                        "windows": len(text),
                        **found,
                    }
                )
                print(f"{model.name} {bits} bits, {label}, {options.passes} passes, rate {options.rate:g}: KL {found['kl']:.5f} +- {found['kl_error']:.5f}, dev {found['dev']:.5f} ({found['seconds']:.0f} s)", flush=True)  # fmt: skip
                path.write_text(json.dumps(rows, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each set of parameters, a column for each model and width."""
    columns = list(dict.fromkeys((row["model"], row["bits"]) for row in rows))
    head = ["moved", *(f"{model}, {bits} bits" for model, bits in columns)]
    lines = [head, ["---"] + ["---:"] * len(columns)]
    for label in SETS:
        cells = {(row["model"], row["bits"]): f"{row['kl']:.4f}" for row in rows if row["moved"] == label}
        lines.append([label, *(cells.get(column, "") for column in columns)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
