"""What a caller may choose of the checkpoint's arithmetic (`arithmetic`). Torch-free, so that the command line knows it."""

ENGINE, EXACT = "engine", "exact"
ACTIVATIONS = (ENGINE, EXACT)
KV_DTYPES = ("auto", "bf16", "fp8")
INDEX_DTYPES = ("bf16", "fp8")
