"""lm-eval's `--model hf` reads an output of M2 as it is, and gives the log-likelihoods that m3quant computes of the stored weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m3quant.calibration.corpus import load_tokenizer
from m3quant.calibration.stream import nll
from m3quant.evaluate.models import open_model
from tests.support.convert.common import run_convert
from tests.support.paths import FIXTURES


def test_log_likelihoods_of_an_m2_output(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    out = tmp_path / "out"
    run_convert(
        FIXTURES / "tiny-m2", out, "awq", rounding="nearest"
    )  # INT4 experts, INT8 attention: no activation is rounded
    text = (FIXTURES / "heldout.txt").read_text(encoding="utf-8")[3000:4200]
    program = HFLM(pretrained=str(out), dtype="float32", device="cpu", batch_size=1, max_length=512)
    request = Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("t", 0, 1))
    (found,) = program.loglikelihood_rolling([request], disable_tqdm=True)

    ids = load_tokenizer(out)(text, add_special_tokens=False)["input_ids"]
    assert len(ids) < 512, "one window"
    prefix = program.prefix_token_id
    model = open_model(out)
    model.reader.dtype = torch.float32  # type: ignore[union-attr]
    ours = -nll(model.reader, torch.tensor([[prefix, *ids]]), "cpu", torch.float32, micro_batch=1).sum()
    print(f"lm-eval {found:.4f}, ours {float(ours):.4f} nats over {len(ids)} tokens")
    assert float(ours) == pytest.approx(found, abs=1e-3 * len(ids))
