"""Recipes that ship with m3quant, one YAML an output. Copy one, change it, and pass it with --recipe."""
