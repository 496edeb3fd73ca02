"""Writes awq_golden.safetensors next to itself with AutoAWQ 0.2.9's own quantizer and packer.

Needs an environment of its own: autoawq==0.2.9, transformers==4.51.3, datasets<4, any torch.
Tests only read the result.

Two cases, `g32` ([32, 64], group 32) and `channel` ([32, 96], one group per row), each following
`AwqQuantizer._apply_quant`:

    CASE.weight        F16 [N, K]     random normal, scaled per output row
    CASE.rounded       F32 [N, K]     `AwqQuantizer.pseudo_quantize_tensor(weight)`: the weight already on the grid
    CASE.qweight, CASE.qzeros, CASE.scales    `WQLinear_GEMM.from_linear` of `rounded`
    CASE.dequantized   F16 [K, N]     `awq.utils.packing_utils.dequantize_gemm` of these
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.quantize.quantizer import AwqQuantizer
from awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import save_file


def case(rows: int, columns: int, group: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    spread = torch.logspace(-2, 0, rows)[:, None]
    weight = (torch.randn(rows, columns, generator=generator) * spread + 0.3 * spread).half()
    settings = SimpleNamespace(group_size=group, zero_point=True, w_bit=4)
    rounded, scales, zeros = AwqQuantizer.pseudo_quantize_tensor(settings, weight.float())
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = rounded
    packed = WQLinear_GEMM.from_linear(linear, 4, group, False, scales.t().contiguous(), zeros.t().contiguous())
    return {
        "weight": weight,
        "rounded": rounded,
        "qweight": packed.qweight,
        "qzeros": packed.qzeros,
        "scales": packed.scales,
        "dequantized": dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, group),
    }


def main() -> None:
    generator = torch.Generator().manual_seed(20)
    cases = {"g32": case(32, 64, 32, generator), "channel": case(32, 96, 96, generator)}
    tensors = {f"{name}.{key}": t.contiguous() for name, parts in cases.items() for key, t in parts.items()}
    save_file(tensors, Path(__file__).with_name("awq_golden.safetensors"), metadata={"made_by": "autoawq 0.2.9"})


if __name__ == "__main__":
    main()
