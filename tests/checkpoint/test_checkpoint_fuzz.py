"""A sound checkpoint mutated a few thousand ways: refused with a CheckpointError, or exactly right; nothing between.

The reference is the safetensors library, on the mutated bytes: a shard that m3quant accepts, it accepts, with
the same names, dtypes, shapes and bytes. Beyond that, what a mutation did not touch must read as in the original.
"""

import json
import random
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import deserialize
from safetensors.torch import save

from m3quant.checkpoint import Checkpoint
from m3quant.errors import CheckpointError
from tests.support import adversarial

SHARDS = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
INDEX, CONFIG = adversarial.INDEX, adversarial.CONFIG
MUTATIONS_PER_KIND = 90  # with an index, and as many without
Files = dict[str, bytes]


def original(index: bool) -> Files:
    """Three shards of small tensors of many dtypes, some empty, some scalar."""
    generator = torch.Generator().manual_seed(7)
    dtypes = [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8, torch.int32, torch.int64, torch.float16]
    shapes = [[3, 4], [], [5], [0, 2], [2, 1, 3], [1]]
    files: Files = {CONFIG: b'{"architectures": ["MiniMaxM2ForCausalLM"], "hidden_size": 3072}'}
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(SHARDS):
        tensors = {}
        for i in range(6):
            dtype, shape = dtypes[(number * 6 + i) % len(dtypes)], shapes[(number + i) % len(shapes)]
            count = torch.Size(shape).numel() * dtype.itemsize
            bits = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
            tensors[f"model.layers.{number}.w{i}"] = bits.view(dtype).reshape(shape)
        files[shard] = save(tensors, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if index:
        files[INDEX] = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}).encode()
    return files


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a sound shard."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def flip(data: bytes, rng: random.Random, low: int, high: int) -> bytes:
    """Flip one to three bits between two byte positions."""
    mutable = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        mutable[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    return bytes(mutable)


def splice(data: bytes, rng: random.Random, low: int, high: int) -> bytes:
    """Delete, insert or repeat a few bytes between two positions."""
    at, count = rng.randrange(low, high), rng.randrange(1, 6)
    kind = rng.randrange(3)
    if kind == 0:
        return data[:at] + data[at + count :]
    if kind == 1:
        return data[:at] + bytes(rng.choice(b'{}[]",:0123456789 -.eE\x00\xff') for _ in range(count)) + data[at:]
    return data[: at + count] + data[at:]


def header_end(data: bytes) -> int:
    return 8 + int(struct.unpack("<Q", data[:8])[0])


# Each mutation changes `files` in place.


def header_bits(files: Files, rng: random.Random) -> None:
    shard = rng.choice(SHARDS)
    files[shard] = flip(files[shard], rng, 8, header_end(files[shard]))


def length_bits(files: Files, rng: random.Random) -> None:
    shard = rng.choice(SHARDS)
    files[shard] = flip(files[shard], rng, 0, 8)


def header_splice(files: Files, rng: random.Random) -> None:
    shard = rng.choice(SHARDS)
    files[shard] = splice(files[shard], rng, 8, header_end(files[shard]))


def header_splice_with_its_length(files: Files, rng: random.Random) -> None:
    shard = rng.choice(SHARDS)
    end = header_end(files[shard])
    raw = splice(files[shard][8:end], rng, 0, end - 8)
    files[shard] = adversarial.pack(raw, files[shard][end:])


def header_length(files: Files, rng: random.Random) -> None:
    shard = rng.choice(SHARDS)
    length = rng.choice([0, 1, 2, rng.randrange(2**63), 2**64 - 1, 100_000_000, 100_000_001, rng.randrange(2000)])
    files[shard] = struct.pack("<Q", length) + files[shard][8:]


def truncated(files: Files, rng: random.Random) -> None:
    name = rng.choice(sorted(files))
    files[name] = files[name][: rng.randrange(len(files[name]))]


def appended(files: Files, rng: random.Random) -> None:
    name = rng.choice(sorted(files))
    files[name] += bytes(rng.choice(b"\x00 }\xff") for _ in range(rng.randrange(1, 20)))


def entry_field(files: Files, rng: random.Random) -> None:
    """Change one field of one tensor, and write the header anew with its right length."""
    shard = rng.choice(SHARDS)
    header, payload = split(files[shard])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    odd: list[Any] = [-1, 2**31, 2**62, 2**64, 10**30, 1.5, True, None, "3", [], {}]
    field = rng.choice(["dtype", "shape", "data_offsets", "drop", "more"])
    if field == "dtype":
        entry["dtype"] = rng.choice(["F32", "BF16", "F16", "I16", "U8", "F8_E4M3", "BOOL", "F4", "Q8", "", 3, None])
    elif field == "drop":
        entry.pop(rng.choice(list(entry)))
    elif field == "more":
        entry[rng.choice(["stride", "dtype ", ""])] = 1
    else:
        values = list(entry[field])
        action = rng.randrange(5)
        if action == 0 or not values:
            values.insert(rng.randrange(len(values) + 1), rng.choice([0, 1, 2, *odd]))
        elif action == 1:
            values.pop(rng.randrange(len(values)))
        elif action == 2:
            values[rng.randrange(len(values))] = rng.choice(odd)
        elif action == 3:
            values[rng.randrange(len(values))] += rng.choice([-8, -2, -1, 1, 2, 8, 64])
        else:
            rng.shuffle(values)
        entry[field] = rng.choice([values, values, values, rng.choice(odd)])
    files[shard] = adversarial.pack(header, payload)


def entries_swapped(files: Files, rng: random.Random) -> None:
    """Exchange the whole entries, or only the offsets, of two tensors."""
    shard = rng.choice(SHARDS)
    header, payload = split(files[shard])
    first, second = rng.sample([name for name in header if name != "__metadata__"], 2)
    if rng.random() < 0.5:
        header[first], header[second] = header[second], header[first]
    else:
        a, b = header[first], header[second]
        a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
    files[shard] = adversarial.pack(header, payload)


def payload_grown_or_shrunk(files: Files, rng: random.Random) -> None:
    shard = rng.choice(SHARDS)
    header, payload = split(files[shard])
    at, count = rng.randrange(len(payload)), rng.randrange(1, 9)
    payload = payload[:at] + payload[at + count :] if rng.random() < 0.5 else payload[:at] + bytes(count) + payload[at:]
    files[shard] = adversarial.pack(header, payload)


def duplicate_key(files: Files, rng: random.Random) -> None:
    shard = rng.choice(SHARDS)
    header, payload = split(files[shard])
    name = rng.choice([name for name in header if name != "__metadata__"])
    text = json.dumps(header)
    twin = json.dumps(header[rng.choice([name, name, rng.choice(list(header))])])
    files[shard] = adversarial.pack(f"{text[:-1]}, {json.dumps(name)}: {twin}}}".encode(), payload)


def tensor_renamed(files: Files, rng: random.Random) -> None:
    """Give a tensor a new name, or one that this or another shard has already."""
    shard = rng.choice(SHARDS)
    header, payload = split(files[shard])
    names = [name for name in header if name != "__metadata__"]
    other, _ = split(files[rng.choice(SHARDS)])
    new = rng.choice(["new", "", "\ud800", "a\nb", "__metadata__", *(name for name in other if name != "__metadata__")])
    old = rng.choice(names)
    header = {new if name == old else name: entry for name, entry in header.items()}
    files[shard] = adversarial.pack(header, payload)


def payload_bits(files: Files, rng: random.Random) -> None:
    shard = rng.choice(SHARDS)
    files[shard] = flip(files[shard], rng, header_end(files[shard]), len(files[shard]))


def shard_files(files: Files, rng: random.Random) -> None:
    """Lose, rename, exchange or duplicate whole shards."""
    first, second = rng.sample(SHARDS, 2)
    action = rng.randrange(5)
    if action == 0:
        del files[first]
    elif action == 1:
        files[rng.choice(["other.safetensors", ".hidden.safetensors", "x.bin"])] = files.pop(first)
    elif action == 2:
        files[first], files[second] = files[second], files[first]
    elif action == 3:
        files[rng.choice(["copy.safetensors", second])] = files[first]
    else:
        files[first] = rng.choice([b"", b"\x00" * 8, struct.pack("<Q", 2) + b"{}", bytes(rng.randbytes(64))])


def index_bits(files: Files, rng: random.Random) -> None:
    if INDEX in files:
        files[INDEX] = flip(files[INDEX], rng, 0, len(files[INDEX]))
    else:
        header_bits(files, rng)


def index_splice(files: Files, rng: random.Random) -> None:
    name = INDEX if INDEX in files else CONFIG
    files[name] = splice(files[name], rng, 0, len(files[name]))


def index_entry(files: Files, rng: random.Random) -> None:
    """Change one assignment of the index, or what it says in total."""
    index = json.loads(files.get(INDEX, b'{"weight_map": {}}'))
    weight_map = index["weight_map"]
    name = rng.choice([*weight_map, "absent"])
    action = rng.randrange(6)
    if action == 0:
        weight_map[name] = rng.choice(SHARDS)
    elif action == 1:
        weight_map.pop(name, None)
    elif action == 2:
        weight_map[name + rng.choice(["", ".x"])] = rng.choice(
            ["../" + SHARDS[0], "/" + SHARDS[0], "./" + SHARDS[0], "", ".", "x.bin", 1, None, [], "a\x00.safetensors"]
        )
    elif action == 3:
        index["metadata"] = rng.choice([{}, None, [], {"total_size": rng.choice([0, -1, 1.5, "1", None, 10**30])}])
    elif action == 4:
        index["weight_map"] = rng.choice([None, [], {}, 3, list(weight_map)])
    else:
        index["weight_map"] = {key: rng.choice(SHARDS) for key in weight_map}
    files[INDEX] = json.dumps(index).encode()


def config_bits(files: Files, rng: random.Random) -> None:
    files[CONFIG] = flip(files[CONFIG], rng, 0, len(files[CONFIG]))


KINDS: list[Callable[[Files, random.Random], None]] = [
    header_bits, length_bits, header_splice, header_splice_with_its_length, header_length, truncated, appended,
    entry_field, entries_swapped, payload_grown_or_shrunk, duplicate_key, tensor_renamed, payload_bits, shard_files,
    index_bits, index_splice, index_entry, config_bits,
]  # fmt: skip


def put(folder: Path, files: Files, before: Files) -> None:
    """Make the folder hold `files`, given that it holds `before`."""
    for name in before.keys() - files.keys():
        (folder / name).unlink()
    for name, data in files.items():
        if before.get(name) != data:
            (folder / name).write_bytes(data)


def reference(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """What the safetensors library finds in a shard. Raises its error if it refuses."""
    return {name: (view["dtype"], view["shape"], bytes(view["data"])) for name, view in deserialize(data)}


def check_accepted(checkpoint: Checkpoint, files: Files, sound: Files) -> None:
    """What was accepted is right: by the library's reading of the bytes, by the index, and by the original."""
    shards = sorted(name for name in files if name.endswith(".safetensors") and not name.startswith("."))
    assert sorted(checkpoint.shards) == shards
    found = {shard: reference(files[shard]) for shard in shards}
    names = [name for tensors in found.values() for name in tensors]
    assert sorted(checkpoint.tensors) == sorted(names), "a tensor is lost or there twice"
    if INDEX in files:
        weight_map = json.loads(files[INDEX])["weight_map"]
        assert weight_map == {name: info.shard for name, info in checkpoint.tensors.items()}
    assert checkpoint.config == json.loads(files[CONFIG])
    originals = {shard: reference(sound[shard]) for shard in SHARDS}
    tensors = checkpoint.read_many(checkpoint.tensors)
    for name, info in checkpoint.tensors.items():
        dtype, shape, data = found[info.shard][name]
        assert (info.dtype, list(info.shape)) == (dtype, shape)
        read = tensors[name]
        assert bytes(read.reshape(-1).view(torch.uint8).numpy()) == data == checkpoint.read_bytes(name)
        assert list(read.shape) == shape
        if files[info.shard] == sound.get(info.shard):
            assert (dtype, shape, data) == originals[info.shard][name]


def outcome(folder: Path, files: Files, sound: Files) -> str:
    """Open what is on disk: "refused", "accepted", or "unchanged". Raises AssertionError for anything between."""
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError as error:
        # A refusal must name the folder or a file in it, so that its reader knows where to look.
        assert str(folder) in str(error)
        return "refused"
    check_accepted(checkpoint, files, sound)
    return "unchanged" if files == sound else "accepted"


def test_a_mutated_checkpoint_is_refused_or_exactly_right(tmp_path: Path) -> None:
    outcomes: dict[str, Counter[str]] = {kind.__name__: Counter() for kind in KINDS}
    on_disk: Files = {}
    for index in (True, False):
        sound = original(index)
        put(tmp_path, sound, on_disk)
        on_disk = sound
        assert outcome(tmp_path, sound, sound) == "unchanged"
        for kind in KINDS:
            for seed in range(MUTATIONS_PER_KIND):
                files = dict(sound)
                kind(files, random.Random(f"{kind.__name__} {index} {seed}"))
                put(tmp_path, files, on_disk)
                on_disk = files
                try:
                    outcomes[kind.__name__][outcome(tmp_path, files, sound)] += 1
                except Exception as error:
                    raise AssertionError(f"{kind.__name__}, index {index}, seed {seed}: {error!r}") from error
    totals = sum(outcomes.values(), Counter())
    print(f"\n{totals.total()} mutations: {dict(totals)}; by kind:")
    for name, counter in outcomes.items():
        print(f"  {name}: {dict(counter)}")
    assert totals.total() >= 3000
    # The mutations are neither all caught at the door nor mostly harmless: both outcomes are put to the test.
    assert outcomes["payload_bits"]["refused"] == 0
    for name in ("length_bits", "payload_grown_or_shrunk", "duplicate_key", "header_length"):
        assert outcomes[name]["accepted"] == 0, name
    assert totals["refused"] > totals.total() // 2
    assert totals["accepted"] > totals.total() // 20
