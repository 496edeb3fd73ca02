"""The caller's choices for the checkpoint's arithmetic (`arithmetic`). Torch-free, so that the command line can use it."""

ENGINE, EXACT = "engine", "exact"
ACTIVATIONS = (ENGINE, EXACT)
KV_DTYPES = ("auto", "bf16", "fp8")
INDEX_DTYPES = ("bf16", "fp8")
