"""Folds on the trained fixtures in float32, nothing quantized: same logits, same experts, same key blocks."""

import pytest
import torch
import torch.nn.functional as F

from m3quant.calibration.folds import ATTENTION_NORM, MLP_NORM, pair_folds
from m3quant.calibration.layers import Layer
from m3quant.calibration.ops import rms_norm
from m3quant.calibration.stream import embed_source, read_head, read_layer
from m3quant.checkpoint import Checkpoint
from m3quant.families import family_of
from m3quant.quant.reading import SourceReader
from tests.calibration.test_folds import forward, relative, scales
from tests.support.calibration.plain_folds import apply_folds
from tests.support.paths import FIXTURES
from tests.support.text_windows import text_windows

TOKENS = 1536  # three times what tiny-m3's four blocks of 128 cover: selection decides


@pytest.mark.parametrize("name", ["tiny-m2", "tiny-m3"])
def test_folds_of_a_trained_model_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceReader(Checkpoint.open(FIXTURES / name))
    tokens = text_windows(FIXTURES / name, FIXTURES / "heldout.txt", TOKENS, 1)
    states = embed_source(source, tokens, torch.float32)
    x = states.read(slice(0, 1))
    specs = family_of(source.config).layers
    plain, folded, entering = [], [], x
    for index, spec in enumerate(specs):
        tensors = {n: t.float() for n, t in read_layer(source, index).items()}
        layer = Layer(spec, tensors, dtype=torch.float32)
        # The scales that AWQ would try: the root of the inputs' mean magnitude, normalised around 1.
        attention_input = layer.attention_input(entering)
        middle = entering + layer.attention(attention_input)
        wanted = {}
        for norm, normed in ((ATTENTION_NORM, attention_input), (MLP_NORM, layer.mlp_input(middle))):
            magnitude = normed.abs().mean((0, 1)).clamp_min(1e-4).sqrt()
            wanted[norm] = magnitude / (magnitude.max() * magnitude.min()).sqrt()
        pairs = None
        if name == "tiny-m2":
            pairs = {pair.down: scales(tensors[pair.down].shape[1], index) for pair in pair_folds(spec)}
        plain.append(tensors)
        folded.append(apply_folds(spec, tensors, wanted, pairs))
        entering = middle + layer.mlp(layer.mlp_input(middle))

    before, experts, blocks = forward(specs, plain, x, monkeypatch)
    after, experts_after, blocks_after = forward(specs, folded, x, monkeypatch)
    head = read_head(source)
    logits, logits_after = (
        F.linear(rms_norm(h, head.norm, head.eps, head.one_plus), head.weight.float()) for h in (before, after)
    )
    error = relative(logits_after, logits)
    chosen = sum(int((a != b).any(-1).sum()) for a, b in zip(experts, experts_after, strict=True))
    moved = sum(int((a != b).any(-1).sum()) for a, b in zip(blocks, blocks_after, strict=True))
    print(
        f"\n{name}: logits change by {error:.2e}; {chosen} router and {moved} block selections change in {TOKENS} tokens"
    )
    assert len(blocks) == (2 if name == "tiny-m3" else 0)
    assert error < 1e-5
    assert chosen == 0 and moved == 0
