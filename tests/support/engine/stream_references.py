"""Reference log-probs for gpu_check.py from m3quant's own float32 stream, activations rounded as engines do, where transformers' release is not to be trusted
(5.17 rotates whole heads on M2): `python -m tests.support.engine.stream_references REFERENCE.json TEXT LENGTH FOLDER...`.

Two prompts of LENGTH tokens from TEXT; the folders' tokenizers must agree. Runs on a GPU where there is one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from m3quant.calibration.stream import nll
from m3quant.evaluate.models import open_model
from m3quant.running.device import pick_device
from tests.support.text_windows import text_windows

PROMPTS = 2


def main() -> None:
    output, text, length, *folders = sys.argv[1:]
    tokens = text_windows(folders[0], Path(text), int(length), PROMPTS)
    device = pick_device("auto")
    references = {}
    for folder in folders:
        model = open_model(folder)
        logprobs = -nll(model.reader, tokens, device, torch.float32, micro_batch=1, schemes=model.schemes)
        references[Path(folder).name] = {"logprobs": logprobs.tolist(), "top1": None}
    Path(output).write_text(json.dumps({"prompts": tokens.tolist(), "references": references}))


if __name__ == "__main__":
    main()
