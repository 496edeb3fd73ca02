"""Calibration: corpora, layer streaming, expert ledger, scale search."""
