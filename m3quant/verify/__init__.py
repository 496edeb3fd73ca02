"""Verification that a converted folder is what its plan promised: structure, values against the source, and the engine's view."""
