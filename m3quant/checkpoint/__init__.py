"""Safetensors checkpoints: opened from headers alone, read on demand, written so that a kill never leaves half a file.

Importing this imports neither torch nor huggingface_hub.
"""

from .checkpoint import Checkpoint, Shard
from .header import (
    DTYPE_BYTES,
    Entry,
    Header,
    TensorInfo,
    aligned_order,
    entry_bytes,
    file_size,
    header_bytes,
    parse_header,
)
from .index import INDEX_NAME
from .listing import CONFIG_NAME
from .reader import torch_dtype
from .writer import (
    ShardRecord,
    ShardWriter,
    json_bytes,
    make_folder,
    sha256_file,
    sync_folder,
    write_bytes_atomic,
    write_json_atomic,
)

__all__ = [
    "CONFIG_NAME",
    "Checkpoint",
    "DTYPE_BYTES",
    "Entry",
    "Header",
    "INDEX_NAME",
    "Shard",
    "ShardRecord",
    "ShardWriter",
    "TensorInfo",
    "aligned_order",
    "entry_bytes",
    "file_size",
    "header_bytes",
    "json_bytes",
    "make_folder",
    "parse_header",
    "sha256_file",
    "sync_folder",
    "torch_dtype",
    "write_bytes_atomic",
    "write_json_atomic",
]
