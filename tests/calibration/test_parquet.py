"""Parquet files of strangers: read under bounds, row by row, and refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from m3quant.calibration.corpus import read_source
from m3quant.calibration.parquet import parquet_rows
from m3quant.errors import CalibrationError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

MB = 2**20
SMALL = 512 * MB  # of memory, beyond what pyarrow takes


def written(path: Path, column: Any, **options: Any) -> Path:
    parquet.write_table(pyarrow.table({"text": column}), path, **options)
    return path


def read(path: Path, record_bytes: int = 64 * MB, memory_bytes: int = SMALL) -> list[object]:
    return [record for _, record in parquet_rows(path, record_bytes, memory_bytes)]


def repeated(rows: int, size: int) -> Any:
    """One string of `size` bytes that the file holds once and all rows name."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), ["x" * size]).cast(
        pyarrow.string()
    )


def test_rows_come_one_by_one(tmp_path: Path) -> None:
    """128 rows of one 4 MB string are half a gigabyte; the file has kilobytes, and no more than a few rows are held at once."""
    path = written(tmp_path / "a.parquet", repeated(128, 4 * MB), compression="zstd", dictionary_pagesize_limit=64 * MB)
    assert path.stat().st_size < MB
    assert [len(record["text"]) for record in read(path)] == [4 * MB] * 128  # type: ignore[index, call-overload]


def test_a_row_that_unfolds_to_gigabytes_is_refused(tmp_path: Path) -> None:
    many = pyarrow.ListArray.from_arrays(pyarrow.array([0, 512], pyarrow.int32()), repeated(512, 4 * MB - 1))
    path = written(tmp_path / "a.parquet", many, compression="zstd", dictionary_pagesize_limit=64 * MB)
    assert path.stat().st_size < MB
    with pytest.raises(CalibrationError, match=r"a\.parquet is not a readable Parquet file: .*(memory|was ended)"):
        read(path)


def test_a_row_of_too_many_bytes_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", ["short", "x" * (2 * MB)])
    with pytest.raises(CalibrationError, match=r"row 2 has more than 1 MiB"):
        read(path, record_bytes=MB)


def test_a_schema_as_deep_as_no_text_is_refused(tmp_path: Path) -> None:
    deep: Any = pyarrow.array(["x"])
    for _ in range(80):
        deep = pyarrow.StructArray.from_arrays([deep], ["a"])
    path = written(tmp_path / "a.parquet", deep)
    with pytest.raises(CalibrationError, match=r"a\.parquet is not a readable Parquet file"):
        read(path)


def test_text_that_is_no_utf8_is_an_odd_row(tmp_path: Path) -> None:
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(),
        2,
        [None, pyarrow.array([0, 4, 8], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"good\xff\xfe\xfd\xfc")],
    )
    loaded = read_source(str(written(tmp_path / "a.parquet", broken)))
    assert [document.text for document in loaded.documents] == ["good"]
    assert "1 of 2 records left out (1 odd)" in loaded.notes[0]


@pytest.mark.parametrize("cut", [1, 100, 1000])
def test_a_file_that_was_cut_is_refused(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path / "a.parquet", [f"text {n}" for n in range(500)])
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CalibrationError, match="is not a readable Parquet file"):
        read(path)


def test_a_csv_row_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3quant.calibration.files.MAX_RECORD_BYTES", 10_000)
    (tmp_path / "a.csv").write_text('text\nfine\n"never closed\n' + "line\n" * 5_000)
    with pytest.raises(CalibrationError, match=r"a\.csv, row 2 has more than .* a quote does not close"):
        read_source(str(tmp_path / "a.csv"))
    (tmp_path / "b.csv").write_text(",".join(["text"] * 10_001) + "\n")
    monkeypatch.undo()
    with pytest.raises(CalibrationError, match="10,001 columns"):
        read_source(str(tmp_path / "b.csv"))
