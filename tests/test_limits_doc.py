"""docs/limits.md says what the code does."""

from __future__ import annotations

import re

from m3quant.calibration import files, parquet, parquet_worker, template, tokenizing
from m3quant.checkpoint import bounded, header, name_list, patterns
from m3quant.cli import fitting
from m3quant.evaluate import openai_server
from m3quant.runtime import draft_format, draft_tables
from tests.support.paths import ROOT

TEXT = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
MODULES = (bounded, header, files, fitting, openai_server, draft_tables)
UNITS = {"MiB": 2**20, "bytes": 1}


def test_every_bound_of_the_table_is_the_codes() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| ")
    ][1:]
    seen = 0
    for _, most, where in rows:
        numbers = [
            int(n.replace(",", "")) * UNITS.get(unit, 1) for n, unit in re.findall(r"([0-9][0-9,]*) (\w+)", most)
        ]
        names = re.findall(r"`(\w+)`", where)
        values = [next(getattr(module, name) for module in MODULES if hasattr(module, name)) for name in names]
        assert numbers == values, (most, where)
        seen += len(names)
    assert seen == 13


def test_the_bounds_of_programs_are_the_codes() -> None:
    for said in (
        f"has {template.CPU_SECONDS:g} s of processor time and {template.CPU_SECONDS_PER_MB:g} s for each MB",
        f"{template.MEMORY_BYTES // 2**30} GiB of memory",
        f"{template.MEMORY_PER_INPUT_BYTE} bytes for each byte of the record",
        f"may write {template.OUTPUT_CHARACTERS // 2**20} Mi characters and {template.OUTPUT_PER_INPUT_BYTE} for each byte",
        f"at most {tokenizing.MOST_GROWTH:g} characters of one",
        f"with {parquet.MEMORY_BYTES // 2**30} GiB of memory beyond what pyarrow takes and {parquet.CPU_SECONDS} s of processor time",
        f"may be {parquet_worker.SCHEMA_DEPTH} levels deep",
        f"at most {files.MAX_COLUMNS:,} columns",
        f"have {patterns.SECONDS:g} s each for all names together",
        f"at most {name_list.MOST_PATTERNS:,} (`MOST_PATTERNS`), and one with `*` at most {name_list.GLOB_CHARACTERS:,} characters",
        f"have {patterns.LIST_SECONDS:g} s (`LIST_SECONDS`), a draft model's {draft_format.SECONDS:g} s",
    ):
        assert said in " ".join(TEXT.split()), said
