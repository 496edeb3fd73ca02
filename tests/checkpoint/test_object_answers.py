"""An object store that answers with other bytes than were asked for: a sentence, whatever was read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from m3quant.checkpoint.object_drivers import S3
from m3quant.checkpoint.object_store import ObjectStore
from m3quant.errors import CheckpointError

OBJECTS = {"bucket/model/config.json": b"{}", "bucket/model/model.safetensors": bytes(1000)}


class WholeObjects:
    """Ignores which part of an object is asked for, and sends a byte more than there are."""

    req_kw: Mapping[str, str] = {}

    def call_s3(self, method: str, **asked: str) -> dict[str, Any]:
        sizes = {name.removeprefix("bucket/"): len(data) for name, data in OBJECTS.items()}
        return {"Contents": [{"Key": name, "Size": size, "ETag": "a"} for name, size in sizes.items()]}

    def info(self, name: str) -> dict[str, Any]:
        return {"name": name, "type": "file", "size": len(OBJECTS[name]), "ETag": "a"}

    def cat_file(self, name: str, start: int, end: int) -> bytes:
        return OBJECTS[name] + b"x"


@pytest.mark.parametrize(
    "read",
    [
        lambda store: store.headers(["model.safetensors"]),
        lambda store: store.digest("model.safetensors"),
        lambda store: store.file("config.json", 1000),
    ],
)
def test_more_bytes_than_were_asked_for(monkeypatch: pytest.MonkeyPatch, read: Callable[[ObjectStore], Any]) -> None:
    monkeypatch.setattr(S3, "open", lambda self: WholeObjects())
    store = ObjectStore("s3://bucket/model")
    with pytest.raises(CheckpointError, match=r"s3://bucket/model/\S+ is not .* S3 lists: .* bytes came in place of"):
        read(store)


class SizesUnknown(WholeObjects):
    def call_s3(self, method: str, **asked: str) -> dict[str, Any]:
        return {"Contents": [item | {"Size": None} for item in super().call_s3(method)["Contents"]]}


@pytest.mark.parametrize(
    "read",
    [
        lambda store: store.files(["config.json"]),
        lambda store: store.digest("model.safetensors"),
        lambda store: store.file("config.json", 1000),
        lambda store: store.headers(["model.safetensors"]),
    ],
)
def test_an_object_of_unknown_size_is_not_taken_for_an_empty_one(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[ObjectStore], Any]
) -> None:
    monkeypatch.setattr(S3, "open", lambda self: SizesUnknown())
    with pytest.raises(CheckpointError, match=r"S3 states no size for s3://bucket/model/\S+\. Download it"):
        read(ObjectStore("s3://bucket/model"))


@pytest.mark.parametrize("kind", ["Contents", "CommonPrefixes"])
def test_a_bucket_without_end_is_listed_no_further_than_the_limit(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    asked: list[str] = []

    class Endless(WholeObjects):
        def call_s3(self, method: str, **given: str) -> dict[str, Any]:
            assert given["Prefix"] == "model/" and given["Delimiter"] == "/" and len(asked) < 50
            asked.append(given.get("ContinuationToken", ""))
            names = [f"model/{len(asked)}-{number}" for number in range(1000)]
            page = {
                "Contents": [{"Key": name, "Size": 1} for name in names],
                "CommonPrefixes": [{"Prefix": f"{name}/"} for name in names],
            }
            return {kind: page[kind], "IsTruncated": True, "NextContinuationToken": str(len(asked))}

    monkeypatch.setattr(S3, "open", lambda self: Endless())
    with pytest.raises(CheckpointError, match=r"s3://bucket/model holds more than 10,000 objects: give the prefix"):
        ObjectStore("s3://bucket/model")
    assert asked == ["", *(str(number) for number in range(1, 11))]
