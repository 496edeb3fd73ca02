"""The long lists in m3quant's own files: of a model with many experts, hundreds of thousands of lines that differ in a number.

Only the first of such lines is looked into, which makes of 25 MB some kilobytes. A line counts as such only if all of it has one of the
forms that these lists have, with no room for any other text; names of tensors are scanned in the headers of the shards, too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from typing import BinaryIO

from ...artifact.manifest import MANIFEST
from ...checkpoint import INDEX_NAME

REPEATING = frozenset({MANIFEST, INDEX_NAME})
LINE_BYTES = 2**16  # of a line that is looked at in one piece; the lists have no longer ones
# Between dots, after a word and before one: the number of a layer, of an expert.
_NUMBER = re.compile(rb"(?<=[a-z]\.)[0-9]{1,4}(?=\.[a-z])")
_SHARD = rb'"model-[0-9]{5}-of-[0-9]{5}\.safetensors"'
_FORM = re.compile(
    rb" *+(?:"  # possessive: or spaces could be divided in many ways
    rb"(?=[\[\]{},0-9])(?:[0-9]{0,9}+[\[\]{}, ])*+[0-9]{0,9}"  # no number so long that it could be text in hex or base64
    rb'|"(?:dtype|kind|scale|shape)": (?:"[A-Za-z0-9_-]{1,24}"|\[)'
    rb'|"(?:[a-z_]+[0-9]{0,2}\.)(?:[0-9]{1,4}\.|[a-z_]+[0-9]{0,2}\.)*[a-z_]+[0-9]{0,2}": (?:\{|' + _SHARD + rb")"
    rb"),?\r?\n"
)
_OF_SHARD = re.compile(_SHARD)


def without_repeats(
    stream: BinaryIO, own: Iterable[str] = (), tells: Callable[[str], bool] = lambda line: False
) -> io.BytesIO:
    """Its lines, of which those are empty that repeat an earlier one with another layer, expert or shard: each stays at its number.

    Kept is a line that has one of the texts `own`, and one behind a line of no such form, or behind a piece of a long one: what began there may end in it.
    tells: whether something is found in a line. Where it is in the first of its kind, all of them are kept: node.8.internal is another host than
    node.7.internal, which alone may be allowed.
    """
    texts = [text.encode() for text in own]
    kinds, listed = dict[bytes, bool](), False  # whether something is found in a kind's first line
    out = io.BytesIO()
    while line := stream.readline(LINE_BYTES):
        after, listed = listed, _FORM.fullmatch(line) is not None
        if listed:
            kind = _OF_SHARD.sub(b"", _NUMBER.sub(b"", line))
            if kind not in kinds:
                kinds[kind] = tells(line.decode("ascii"))
            elif after and not kinds[kind] and not any(text in line for text in texts):
                out.write(b"\n")
                continue
        out.write(line)
    out.seek(0)
    return out
