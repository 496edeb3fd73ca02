"""What each rounding, and each part of feedback, is worth on the trained fixtures: KL divergence to the source.

    python -m tests.benchmarks.rounding_ablation OUT [--section main parts tokens bits] [--model tiny-m2 tiny-m3] [--device cuda]
    python -m tests.benchmarks.rounding_ablation OUT --tables      # OUT/rounding.json as the tables of docs/rounding.md

Calibration text: `tests/fixtures/calibration.jsonl` (own: the fixtures' kind of text) or the bundled corpus, in windows of
512 tokens. KL: nats per token, mean over the first 64 windows of 512 of `heldout.txt` with its standard error over windows;
`dev` is that of the windows behind them, on which settings were chosen. Both are of rounded weights alone; `served` is the
first with activations rounded too, where FP8 weights round them, as the calibrated stream does. Everything is computed in float32. A line is printed, and OUT/rounding.json rewritten, after every run.

main: all roundings, both texts, FP8 and INT8 around INT4 experts. parts: feedback with one part taken out. tokens: few
windows of own text. bits: experts of two and three bits. On one H200 all of it takes some minutes, on two CPU cores hours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from m3quant.calibration.awq_quantizer import AwqQuantizer
from m3quant.calibration.awq_settings import AwqSettings
from m3quant.calibration.boundary import WindowView
from m3quant.calibration.corpus import load_documents, load_tokenizer, tokenize_windows
from m3quant.calibration.feedback import attention, evidence, fit, mlp
from m3quant.calibration.feedback.quantizer import FeedbackQuantizer
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.head import compare_heads
from m3quant.calibration.layers import Layer, layer_shapes, layer_spec
from m3quant.calibration.quantized_layer import QuantizedLayer
from m3quant.calibration.stream import HiddenStates, embed_source, read_head, read_layer, run_layer
from m3quant.checkpoint import Checkpoint
from m3quant.errors import CalibrationError
from m3quant.quant.reading import SourceReader
from m3quant.schemes import Scheme
from tests.support.paths import FIXTURES

LENGTH, JUDGED, BUNDLED = 512, 64, 128
MICRO_BATCH = 16
INT4, INT8, FP8 = Scheme("int", 4, 128), Scheme("int", 8, 128), Scheme("fp8", 8)
AROUND = {"fp8": FP8, "int8": INT8}
EXPERTS = {
    "int4-g128": INT4,
    "int3-g128": Scheme("int", 3, 128),
    "int2-g128": Scheme("int", 2, 128),
    "int2-g128-asym": Scheme("int", 2, 128, symmetric=False),
}
NEAREST = AwqSettings(smooth=False, range_search=False)
EVERYTHING = 10**6  # windows: as many as the text has
PARTS: dict[str, dict[str, Any]] = {
    "feedback": {},
    "the weight's own outputs as target": {"source_targets": False},
    "no residual in the targets of o and w2": {"residual": False},
    "scales as first searched": {"refit": False},
    "the first sweep alone": {"rounds": 0},
    "one round": {"rounds": 1},
    "two rounds": {"rounds": 2},
    "eight rounds": {"rounds": 8},
    "positive scales only": {"signed_scales": False},
    "damping and ridge of one constant, 0.1 and 0.5": {"patch": "constant"},
    "a quarter of the damping": {"patch": "quarter"},
    "four times the damping": {"patch": "four"},
    "no prior": {"patch": "no prior"},
    "no verdict of held-out rows": {"patch": "no verdict"},
}


def scheme_of(name: str, experts: Scheme, around: Scheme) -> Scheme | None:
    """The scheme of a tensor by its name relative to the layer; None for norms and routers."""
    if ".experts." in name:
        return experts
    inside = name.startswith(("self_attn.", "mlp.")) or ".shared_experts." in name
    return around if inside and name.endswith("proj.weight") else None


class Model:
    """A fixture with everything that does not change from run to run."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.source = SourceReader(Checkpoint.open(FIXTURES / name))
        self.specs = [layer_spec(self.source.config, index) for index in range(self._layers())]
        self.layers = [read_layer(self.source, spec.index) for spec in self.specs]
        self.head = read_head(self.source, device)
        self.tokenizer = load_tokenizer(FIXTURES / name)
        ids = self.tokenizer((FIXTURES / "heldout.txt").read_text(), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        self.heldout = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
        self._text: dict[str, torch.Tensor] = {}
        self._source_states: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def _layers(self) -> int:
        config = self.source.config
        return int(config.get("text_config", config)["num_hidden_layers"])

    def text(self, kind: str, windows: int) -> torch.Tensor:
        """[S, L] calibration tokens: the first `windows` windows of "own" or "bundled" text, or all there are."""
        if kind not in self._text:
            documents = load_documents(str(FIXTURES / "calibration.jsonl") if kind == "own" else None)
            self._text[kind] = longest(lambda n: tokenize_windows(documents, self.tokenizer, n, LENGTH, seed=0).ids)
        return self._text[kind][:windows]

    def source_states(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """The source's hidden states into every layer and out of the last; kept for the next run on the same tokens."""
        if self._source_states is None or not torch.equal(self._source_states[0], tokens):
            states = embed_source(self.source, tokens, torch.float32, self.device)
            found = [states.read(slice(None)).clone()]
            for spec, tensors in zip(self.specs, self.layers, strict=True):
                run_layer(Layer(spec, tensors, self.device, torch.float32), states, MICRO_BATCH)
                found.append(states.read(slice(None)).clone())
            self._source_states = tokens, found
        return self._source_states[1]


def longest(cut: Any) -> torch.Tensor:
    """As many windows as the text has, at most 1,024."""
    low, high = 1, 1024
    while low < high:
        middle = (low + high + 1) // 2
        try:
            cut(middle)
            low = middle
        except CalibrationError:
            high = middle - 1
    return torch.from_numpy(cut(low))


# Changes a rounded layer: (layer, what was made of it, its calibration windows in the quantized stream, the source's output of them).
After = Callable[[Layer, QuantizedLayer, HiddenStates, torch.Tensor], None]


def divergences(
    model: Model,
    experts: Scheme | Sequence[Scheme],
    around: Scheme,
    rounding: str,
    text: torch.Tensor,
    after: After | None = None,
    **more: Any,
) -> dict[str, Any]:
    """KL of one conversion on the evaluated windows and on those for choosing settings. experts: one scheme, or one a layer."""
    tokens = torch.cat([text, model.heldout])
    source, first = model.source_states(tokens), len(text)
    taught, exact = HiddenStates(source[0][:first].clone()), HiddenStates(source[0][first:].clone())
    served = HiddenStates(source[0][first : first + JUDGED].clone())
    rejected, started = 0, time.perf_counter()
    for spec, tensors, given in zip(model.specs, model.layers, source, strict=False):
        layer = Layer(spec, tensors, model.device, torch.float32)
        own = experts if isinstance(experts, Scheme) else experts[spec.index]
        named = {name: scheme_of(name, own, around) for name in layer_shapes(spec)}
        schemes = {name: scheme for name, scheme in named.items() if scheme is not None}
        quantizer, settings = quantizer_of(rounding, more)
        views = [WindowView(states, 0, first) for states in (taught, HiddenStates(given))]
        found = quantizer.quantize(spec, tensors, schemes, *views, settings, model.device, torch.float32, layer)
        for name, tensor in found.other.items():
            layer.set_weight(name, tensor)
        for name in schemes:
            layer.set_weight(name, found.weights[name].dequantized().to(torch.bfloat16))
        weights = [w for block in found.log["blocks"] for w in block.get("weights", {}).values()]
        rejected += sum(any("rounded to nearest" in note for note in w.get("notes", ())) for w in weights)
        if after is not None:
            after(layer, found, taught, source[spec.index + 1][:first])
        run_layer(layer, exact, MICRO_BATCH)
        layer.round_activations(schemes)
        for states in (taught, served):
            run_layer(layer, states, MICRO_BATCH)
    seconds = time.perf_counter() - started
    kl, engine = (
        compare_heads(
            model.head, model.head, HiddenStates(source[-1][first : first + len(own)]), own, model.heldout[: len(own)]
        )
        .kl.double()
        .mean(1)
        for own in (exact, served)
    )
    test, dev = kl[:JUDGED], kl[JUDGED:]
    error = float(test.std() / len(test) ** 0.5)
    return {
        "kl": float(test.mean()),
        "kl_error": error,
        "served": float(engine.mean()),
        "dev": float(dev.mean()),
        "rejected": rejected,
        "seconds": seconds,
    }


def quantizer_of(rounding: str, more: dict[str, Any]) -> tuple[Any, Any]:
    if rounding == "feedback":
        return FeedbackQuantizer(), FeedbackSettings(**more)
    return AwqQuantizer(), NEAREST if rounding == "nearest" else AwqSettings()


@contextlib.contextmanager
def patched(name: str | None) -> Iterator[None]:
    """Feedback with another damping, without its prior, or without the verdict of held-out rows."""
    with contextlib.ExitStack() as stack:
        for times, key in ((0.25, "quarter"), (4.0, "four")):
            for module, rules in ((mlp, ("NORMED", "GATED")), (attention, ("NORMED", "HEADS"))):
                for rule in rules if key == name else ():
                    own = getattr(evidence, rule)
                    stack.enter_context(mock.patch.object(module, rule, evidence.Rule(own.damping * times, own.ridge)))
        if name == "constant":
            stack.enter_context(mock.patch.object(evidence, "_DAMPING", (0.1, 0.1)))
            stack.enter_context(mock.patch.object(evidence, "_RIDGE", (0.5, 0.5)))
        if name == "no prior":
            stack.enter_context(mock.patch.object(evidence, "PRIOR_ROWS", 0.0))
        if name == "no verdict":
            stack.enter_context(mock.patch.object(fit, "heldout_errors", always_better))
        yield


def always_better(moments: Any, readers: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (len(moments), len(readers.sizes))
    return torch.ones(shape, device=readers.weight.device), torch.zeros(shape, device=readers.weight.device)


def runs(section: str) -> Iterator[dict[str, Any]]:
    """The runs of a section: label, experts, around, rounding, text, windows, and settings of feedback."""
    base = {"experts": "int4-g128", "around": "fp8", "text": "own", "windows": EVERYTHING}
    if section == "main":
        for around in AROUND:
            yield {**base, "around": around, "rounding": "nearest", "windows": 1}
            for text, windows in (("own", EVERYTHING), ("bundled", BUNDLED)):
                for rounding in ("awq", "feedback"):
                    yield {**base, "around": around, "rounding": rounding, "text": text, "windows": windows}
    elif section == "parts":
        for windows in (EVERYTHING, 4):
            for label, settings in PARTS.items():
                yield {
                    **base,
                    "around": "int8",
                    "rounding": "feedback",
                    "windows": windows,
                    "label": label,
                    "settings": settings,
                }
    elif section == "tokens":
        for windows in (1, 2, 4, 8, 16, 32, 64):
            for rounding in ("awq", "feedback"):
                yield {**base, "rounding": rounding, "windows": windows}
    else:
        for experts in list(EXPERTS)[1:]:
            for rounding in ("nearest", "awq", "feedback"):
                yield {**base, "experts": experts, "around": "int8", "rounding": rounding}
            for label in ("one round", "two rounds"):
                yield {
                    **base,
                    "experts": experts,
                    "around": "int8",
                    "rounding": "feedback",
                    "label": label,
                    "settings": PARTS[label],
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    sections = ("main", "parts", "tokens", "bits")
    parser.add_argument("--section", nargs="+", choices=sections, default=sections)
    parser.add_argument("--model", nargs="+", default=["tiny-m2", "tiny-m3"])
    parser.add_argument("--rounding", nargs="+", default=["nearest", "awq", "feedback"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tables", action="store_true", help="print OUT/rounding.json as Markdown and do nothing else")
    options = parser.parse_args()
    if options.tables:
        found = json.loads((options.out if options.out.is_file() else options.out / "rounding.json").read_text())
        print(tables(found["rows"] if isinstance(found, dict) else found))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    models = [Model(name, torch.device(options.device)) for name in options.model]
    rows: list[dict[str, Any]] = []
    for section in options.section:
        for run in runs(section):
            if run["rounding"] not in options.rounding:
                continue
            for model in models:
                settings = dict(run.get("settings", {}))
                text = model.text(run["text"], run["windows"])
                with patched(settings.pop("patch", None)):
                    found = divergences(
                        model, EXPERTS[run["experts"]], AROUND[run["around"]], run["rounding"], text, **settings
                    )
                rows.append({"section": section, "model": model.name, **run, "windows": len(text), **found})
                print(line(rows[-1]), flush=True)
                (options.out / "rounding.json").write_text(json.dumps(rows, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    what = f"{row['model']} {row['experts']} {row['around']} around, {row['rounding']}, {row['windows']} windows of {row['text']}"
    label = f", {row['label']}" if "label" in row else ""
    return f"{what}{label}: KL {row['kl']:.5f} +- {row['kl_error']:.5f}, served {row['served']:.5f}, dev {row['dev']:.5f} ({row['seconds']:.0f} s)"


def tables(rows: list[dict[str, Any]]) -> str:
    """One Markdown table a section: a row for each kind of run, a column for each model: KL, and KL as served."""
    models = sorted({row["model"] for row in rows})
    head = ["experts", "around", "rounding", "calibration", *models]
    parts = []
    for section in dict.fromkeys(row["section"] for row in rows):
        found: dict[tuple[str, ...], dict[str, str]] = {}
        for row in (row for row in rows if row["section"] == section):
            text = "" if row["rounding"] == "nearest" else f"{row['windows']} windows, {row['text']} text"
            digits = 4 if row["kl"] < 0.1 else 3
            cell = f"{row['kl']:.{digits}f} ± {row['kl_error']:.{digits}f}, {row['served']:.{digits}f}"
            names = (row["experts"], row["around"], row.get("label", row["rounding"]), text)
            found.setdefault(names, {})[row["model"]] = cell
        lines = [head, ["---"] * 4 + ["---:"] * len(models)]
        lines += [[*names, *(cells.get(model, "") for model in models)] for names, cells in found.items()]
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
