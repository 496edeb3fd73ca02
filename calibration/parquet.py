"""The rows of a Parquet file, read by `parquet_worker` in a process of its own under bounds."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from m3quant.calibration.dialects import FIELDS, KNOWN
from m3quant.calibration.documents import OddRecord
from m3quant.errors import CalibrationError

WORKER = Path(__file__).with_name("parquet_worker.py")
MEMORY_BYTES = 4 * 2**30  # beyond what Python and pyarrow take: a row group's columns, and a few rows
CPU_SECONDS = 600


def parquet_rows(path: Path, record_bytes: int, memory_bytes: int = MEMORY_BYTES) -> Iterator[tuple[str, object]]:
    """(where, record) of every row. Raises CalibrationError for a file that is none, has no text, or goes beyond the bounds."""
    if find_spec("pyarrow") is None:
        raise CalibrationError(f"{path}: reading Parquet needs pyarrow; install it with pip install 'm3quant[data]'.")
    with tempfile.TemporaryFile() as errors:
        worker = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
        try:
            assert worker.stdin is not None and worker.stdout is not None
            asked = {
                "path": str(path.resolve()), "memory_bytes": memory_bytes, "cpu_seconds": CPU_SECONDS, "record_bytes": record_bytes,
            }  # fmt: skip
            worker.stdin.write(json.dumps(asked).encode() + b"\n")
            worker.stdin.close()
            yield from _records(path, worker, record_bytes)
        finally:
            worker.kill()
            worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()


def _records(path: Path, worker: subprocess.Popen[bytes], record_bytes: int) -> Iterator[tuple[str, object]]:
    number = 0
    while True:
        told = _message(path, worker, record_bytes)
        if "record" in told:
            number += 1
            yield f"{path}, row {number}", {name: _without_nulls(cell) for name, cell in told["record"].items()}
        elif "odd" in told:
            number += 1
            where = f"{path}, row {number}"
            yield where, OddRecord(f"{where}: {told['odd']}.")
        elif "columns" in told:
            if not KNOWN & set(told["columns"]):
                raise CalibrationError(f"{path} has the columns {', '.join(told['columns'][:50])}; it needs {FIELDS}.")
        elif "rows" in told:
            if not number:
                raise CalibrationError(f"{path} has no rows; give a file with text.")
            return
        else:
            raise CalibrationError(f"{path} is not a readable Parquet file: {told['error']}; fetch or write it again.")


def _message(path: Path, worker: subprocess.Popen[bytes], record_bytes: int) -> dict[str, Any]:
    assert worker.stdout is not None
    line = worker.stdout.readline(record_bytes + 2)
    if line.endswith(b"\n"):
        told: dict[str, Any] = json.loads(line)
        return told
    code = worker.wait()
    raise CalibrationError(
        f"{path} is not a readable Parquet file: the process that read it was ended ({code}), by its limits or by the file's "
        "damage; fetch or write it again, or give JSON lines."
    )


def _without_nulls(value: Any) -> Any:
    """Parquet gives every struct the fields of all: those of others are null, in arguments of tool calls too."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
