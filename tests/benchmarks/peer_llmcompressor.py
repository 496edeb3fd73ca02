"""llm-compressor on a folder, by the same targets as m3quant's: `PYTHON -m tests.benchmarks.peer_llmcompressor SRC DST OUT.json DEVICE WORKERS`.

For the Python that has llmcompressor (0.14): `model_free_ptq` with the quantization_config that m3quant would write, given
as OUT.config.json. Writes seconds and peaks; imports are not counted. peer_awq.py is its sibling for calibrated recipes.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def write_progress(answer: str, **facts: Any) -> None:
    """Beside the answer, how far this run has got: all that is left of one that is stopped."""
    path = Path(answer).with_suffix(".progress.json")
    part = path.with_suffix(".part")
    part.write_text(json.dumps(facts))
    os.replace(part, path)


def write_answer(answer: str, output: str, **facts: Any) -> None:
    """`facts` with the versions, the peaks of this process and the bytes of the output folder."""
    import llmcompressor
    import torch

    result = {
        **facts,
        "version": llmcompressor.__version__,
        "torch": torch.__version__,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "output_bytes": sum(p.stat().st_size for p in Path(output).glob("*.safetensors")),
    }
    Path(answer).write_text(json.dumps(result))


def main() -> None:
    source, output, answer, device, workers = sys.argv[1:]
    from compressed_tensors.quantization import QuantizationConfig
    from llmcompressor import model_free_ptq

    wanted = json.loads(Path(answer).with_suffix(".config.json").read_text())
    config = QuantizationConfig.model_validate(wanted)
    write_progress(answer, started=time.time(), stage="model_free_ptq")
    started = time.perf_counter()
    model_free_ptq(source, output, config=config, ignore=config.ignore, max_workers=int(workers), device=device)
    write_answer(answer, output, seconds=time.perf_counter() - started)


if __name__ == "__main__":
    main()
