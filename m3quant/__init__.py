"""m3quant: MiniMax M3 and M2.x weights to FP8 and AWQ INT4 checkpoints that engines load as they are.

From Python: `from m3quant.api import convert, evaluate, fit, plan, verify`.
"""

__version__ = "0.1.0"
