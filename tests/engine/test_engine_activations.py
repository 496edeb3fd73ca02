"""Rounded activations, compared with vLLM: its own quantizer, its own choice of what is rounded, against m3quant's stream.

One layer or two of the trained fixtures: deeper models do not compare token by token, since a last bit that turns one FP8
code turns more of them in every product that follows (docs/verify.md).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from m3quant.cli import cli
from tests.support.engine.rounding_reference import compare
from tests.support.engine.running import NEEDS_ENGINE
from tests.support.paths import FIXTURES

pytestmark = NEEDS_ENGINE


def first_layers(source: Path, folder: Path, layers: int) -> Path:
    """A copy of a checkpoint that ends after `layers` layers."""
    folder.mkdir()
    tensors = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    number = re.compile(r"\.layers\.(\d+)\.")
    kept = {n: t for n, t in tensors.items() if not (found := number.search(n)) or int(found[1]) < layers}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    text = config.get("text_config", config)
    (folder / "config.json").write_text(json.dumps(cut(config, text["num_hidden_layers"], layers)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def cut(value: Any, before: int, layers: int) -> Any:
    """config.json for fewer layers: lists of one entry per layer are cut too; what describes a vision tower is left."""
    if isinstance(value, dict):
        kept = {k: v if k == "vision_config" else cut(v, before, layers) for k, v in value.items()}
        return kept | ({"num_hidden_layers": layers} if "num_hidden_layers" in value else {})
    return value[:layers] if isinstance(value, list) and len(value) == before else value


@pytest.mark.parametrize(
    ("family", "layers", "length", "options"),
    # 600 tokens: more than M3's selected blocks hold, so that the rounded index projections decide.
    [("m2", 1, 300, ["--to=fp8"]), ("m3", 2, 600, ["--to=fp8-block", "--format=compressed-tensors"])],
)
def test_vllm_rounds_what_the_stream_rounds(
    family: str, layers: int, length: int, options: list[str], tmp_path: Path
) -> None:
    source, output = first_layers(FIXTURES / f"tiny-{family}", tmp_path / "source", layers), tmp_path / "output"
    result = CliRunner().invoke(cli, ["convert", str(source), str(output), "--device=cpu", *options])
    assert result.exit_code == 0, (result.output, result.exception)
    found = compare(output, length)
    print(f"{family}, {layers} layers, {options[0]}:\n{found}")
    assert found.report.problems() == []
    assert found.rounded.median < 0.05 * found.exact.median, (
        "or the engine's plugin is old: tests/support/engine/make_env.sh"
    )
