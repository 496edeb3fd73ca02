"""llm-compressor on a folder, by the same targets as ours: `PYTHON peer_llmcompressor.py SRC DST OUT.json DEVICE WORKERS`.

For the Python that has llmcompressor (0.14): `model_free_ptq` with the quantization_config that m3quant would write, given
as DST.config.json. Prints and writes seconds and peaks; imports are not counted.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path


def main() -> None:
    source, output, answer, device, workers = sys.argv[1:]
    import llmcompressor
    import torch
    from compressed_tensors.quantization import QuantizationConfig
    from llmcompressor import model_free_ptq

    wanted = json.loads(Path(answer).with_suffix(".config.json").read_text())
    config = QuantizationConfig.model_validate(wanted)
    started = time.perf_counter()
    model_free_ptq(source, output, config=config, ignore=config.ignore, max_workers=int(workers), device=device)
    seconds = time.perf_counter() - started
    result = {
        "seconds": seconds,
        "version": llmcompressor.__version__,
        "torch": torch.__version__,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "output_bytes": sum(p.stat().st_size for p in Path(output).glob("*.safetensors")),
    }
    Path(answer).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
