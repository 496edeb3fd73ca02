"""Measure a checkpoint: perplexity, divergence from its source, long context; one pass over the weights for all of it."""
