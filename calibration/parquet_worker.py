"""Reads one Parquet file and writes its rows as JSON lines; started by `parquet`, and imports nothing of m3quant.

A Parquet file can say in a hundred bytes that a value of megabytes comes a million times, or nest its schema until the reader's
stack is full. So it is read in a process of its own, under the kernel's limits on memory and processor time.

    stdin   {"path", "memory_bytes", "cpu_seconds", "record_bytes"}
    stdout  {"columns"}, then {"record"} or {"odd"} a row; {"error"} ends it, {"rows"} too
"""

import inspect
import json
import sys
from contextlib import suppress
from typing import Any

SCHEMA_DEPTH = 64
THRIFT_STRING_BYTES = 16 * 2**20
THRIFT_ITEMS = 1_000_000
ROWS_AT_ONCE = 16


def bound(memory_bytes: int, cpu_seconds: int) -> None:
    """Limits of this process from here on. A system without them (macOS has no limit on memory) reads without."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        with open("/proc/self/statm", "rb") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory_bytes, now + memory_bytes))


def rows(parquet: Any, path: str, record_bytes: int) -> None:
    wanted = {
        "thrift_string_size_limit": THRIFT_STRING_BYTES, "thrift_container_size_limit": THRIFT_ITEMS, "schema_depth_limit": SCHEMA_DEPTH,
        "pre_buffer": False,
    }  # fmt: skip
    known = inspect.signature(parquet.ParquetFile.__init__).parameters
    table = parquet.ParquetFile(path, **{name: value for name, value in wanted.items() if name in known})
    say({"columns": table.schema_arrow.names[:10_000]})
    count = 0
    for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, use_threads=False):
        for at in range(batch.num_rows):
            count += 1
            try:
                # Row by row: what one value of a dictionary stands for is many strings in Python.
                record = {
                    name: column[at].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }
                line = json.dumps({"record": record}, default=str)
            except (ValueError, RecursionError) as error:  # not UTF-8, or nested too deeply
                line = json.dumps({"odd": str(error)[:200]})
            if len(line) > record_bytes:
                say(
                    {
                        "error": f"row {count} has more than {record_bytes // 2**20} MiB: leave out columns that are no text"
                    }
                )
                return
            print(line)
    say({"rows": count})


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message))


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    import pyarrow
    import pyarrow.parquet

    bound(asked["memory_bytes"], asked["cpu_seconds"])
    try:
        rows(pyarrow.parquet, asked["path"], asked["record_bytes"])
    except (MemoryError, pyarrow.ArrowMemoryError):
        say({"error": f"it takes more than {asked['memory_bytes'] // 2**30} GiB of memory to read"})
    except (pyarrow.ArrowException, OSError) as error:
        say({"error": " ".join(str(error).split())[:500]})


if __name__ == "__main__":
    main()
