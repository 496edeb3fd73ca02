"""The serving node: what fits, how to start the engine, and a guard in front of its KV cache. Never imports torch."""
