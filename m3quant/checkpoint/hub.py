"""A checkpoint on the Hugging Face Hub: file list, config, index and shard headers; weights only while a cache is attached.

Headers come by HTTP range requests and go through the same strict parser as local files. Works with huggingface_hub 1.x
(on httpx) and 2.x (on httpx2), whose exceptions differ in their base class. https://huggingface.co/docs/hub/api
"""

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, StoppedError
from ..running.retry import TRANSIENT_STATUS, again, causes
from .bounded import TOKENIZER_BYTES, read_bounded, too_large
from .copying import Copied, copy_file, hash_file
from .header import PREFIX_BYTES, TensorInfo, header_length
from .listing import Listing, classify
from .reader import Stamp, open_file, read_ranges
from .shard_cache import ShardCache
from .writer import sync_folder

# Headers of MiniMax shards take 20-120 KB: one request for most of them.
FIRST_BYTES = 128 * 1024
REQUESTS_AT_ONCE = 8
SHA256_DIGITS = 64
TIMEOUT_SECONDS = 30.0
RETRY_PAUSES_SECONDS = (1.0, 3.0)


class TransientError(CheckpointError):
    """A failure that may be gone at the next try."""

    exit_code = 4


def passing(error: Exception) -> str | None:
    """What happened, in words, where a TransientError says that it may pass."""
    if not isinstance(error, TransientError):
        return None
    answers = (getattr(link, "response", None) for link in causes(error))
    status = next((answer.status_code for answer in answers if answer is not None), None)
    return f"the Hub answered {status}" if status else "the Hub did not answer in full"


class HubStore:
    """One commit of a Hub repo. `revision` (kept as `ref`) is resolved to that commit when the store is made.

    Raises CheckpointError, one sentence and a remedy, for a repo that is absent, private or gated, an unknown revision,
    a Hub that cannot be reached, or an answer that is not the file asked for.
    """

    def __init__(self, repo: str, revision: str | None = None) -> None:
        from huggingface_hub import HfApi

        self.repo = repo
        self.ref = revision
        self.where = repo if revision is None else f"{repo}@{revision}"
        with self.errors("the file list"):
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
        self.revision: str = info.sha or revision or "main"
        siblings = info.siblings or []
        self.sizes: dict[str, int | None] = {file.rfilename: file.size for file in siblings}
        # git's blob sha1 of a small file, the sha256 of a large one
        self.etags: dict[str, str] = {
            file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id or "" for file in siblings
        }
        self.header_digests: dict[str, str] = {}  # shard -> sha256 (hex) of everything before its tensors
        self.cache: ShardCache | None = None

    def path(self, name: str) -> str:
        return f"{self.where}/{name}"

    def listing(self) -> Listing:
        return classify(self.sizes, self.where)

    def file_size(self, name: str) -> int:
        return self.sizes[name] or 0

    def sha256(self, name: str) -> str:
        """The sha256 (hex) that the Hub states of a large file. Raises CheckpointError where it states none."""
        if len(self.etags[name]) != SHA256_DIGITS:
            raise CheckpointError(
                f"The Hub states no sha256 of {self.path(name)}, so that what comes could not be told from a damaged file. "
                "Download it and give the folder."
            )
        return self.etags[name]

    def file(self, name: str, limit: int) -> bytes:
        """A file of at most `limit` bytes, through huggingface_hub's own cache. A larger one is not downloaded."""
        size = self.sizes[name]
        if size is None or size > limit:
            raise CheckpointError(self._no_size(name) if size is None else too_large(self.path(name), size, limit))
        return read_bounded(self._cached(name, False), limit)

    def files(self, names: Iterable[str]) -> Path:
        """The folder of huggingface_hub's cache that holds these files, of at most TOKENIZER_BYTES each, compared with their checksums."""
        wanted = sorted(names)
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            paths = dict(zip(wanted, pool.map(self._small, wanted), strict=True))
        name, path = next(iter(paths.items()))
        return path.parents[name.count("/")]

    def _small(self, name: str) -> Path:
        for forced in (False, True):
            path = again(partial(self._cached, name, forced), passing, RETRY_PAUSES_SECONDS)
            if hash_file(path).has_etag(self.etags[name]):
                return path
        raise CheckpointError(
            f"{self.path(name)} was fetched twice and is not the file that the Hub lists. Try again later."
        )

    def _cached(self, name: str, forced: bool) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # they would be drawn over ours
        with self.errors(name):
            return Path(
                hf_hub_download(
                    self.repo, name, revision=self.revision, etag_timeout=TIMEOUT_SECONDS, force_download=forced
                )
            )

    def is_small(self, name: str) -> bool:
        """Whether a file goes through huggingface_hub's cache: settings, texts and tokenizers, not a draft's weights."""
        return not name.endswith(".safetensors") and self.file_size(name) <= TOKENIZER_BYTES

    def headers(self, names: list[str]) -> dict[str, tuple[bytes, bytes, int]]:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            found = dict(zip(names, pool.map(self._header, names), strict=True))
        self.header_digests = {
            name: hashlib.sha256(prefix + raw).hexdigest() for name, (prefix, raw, _) in found.items()
        }
        return found

    @contextmanager
    def opened(self, shards: Iterable[str], action: str) -> Iterator[tuple[Path, Mapping[str, Stamp]]]:
        """The folder of the attached cache, once it holds these shards."""
        if self.cache is None:
            raise CheckpointError(
                f"{self.where} is on the Hub, where only headers are read: cannot {action} what is there. "
                f"Download it first (m3quant pull {self.where} FOLDER) and give the folder."
            )
        with self.cache.reading(shards) as stamps:
            yield self.cache.folder, stamps

    def peek(self, ranges: Iterable[tuple[TensorInfo, int, memoryview]]) -> None:
        """Bytes of tensors: from the attached cache, or, where there is none, by range requests."""
        wanted = list(ranges)
        if self.cache is not None:
            with self.cache.reading({info.shard for info, _, _ in wanted}) as stamps:
                read_ranges(self.cache.folder, wanted, stamps)
            return

        def fill(part: tuple[TensorInfo, int, memoryview]) -> None:
            info, first, view = part
            size = self.file_size(info.shard)
            view[:] = self._range(info.shard, info.start + first, view.nbytes, size) if view.nbytes else b""

        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            list(pool.map(fill, wanted))

    def copy_file(self, name: str, target: Path) -> Copied:
        """A large file is fetched beside the shards and moved, so that it never lies on the disk twice."""
        if self.is_small(name):
            return copy_file(self._small(name), target)
        if self.cache is None:
            raise CheckpointError(f"{self.path(name)} is not downloaded. Download it and give the folder.")
        path = self.cache.fetch_other(name)
        copied = hash_file(path)
        with open_file(path) as descriptor:
            os.fsync(descriptor)
        os.replace(path, target)
        sync_folder(target.parent)
        return copied

    def _header(self, name: str) -> tuple[bytes, bytes, int]:
        size = self.sizes[name]
        if size is None:
            raise CheckpointError(self._no_size(name))
        first = self._range(name, 0, min(size, FIRST_BYTES), size) if size else b""
        length = header_length(first, size, self.path(name))
        raw = first[PREFIX_BYTES : PREFIX_BYTES + length]
        if len(raw) < length:
            raw += self._range(name, PREFIX_BYTES + len(raw), length - len(raw), size)
        return first[:PREFIX_BYTES], raw, size

    def _no_size(self, name: str) -> str:
        return f"The Hub states no size for {self.path(name)}. Download it and give the folder."

    def _range(self, name: str, start: int, count: int, size: int) -> bytes:
        """`count` bytes of a file from `start` on; a busy server or a dropped connection is asked again."""
        return again(lambda: self._range_once(name, start, count, size), passing, RETRY_PAUSES_SECONDS)

    def _range_once(self, name: str, start: int, count: int, size: int) -> bytes:
        # Streamed, so that never more is read than was asked for, whatever the server sends.
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repo, name, revision=self.revision)
        # 'identity': a compressed answer would not be the bytes asked for.
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
        data = bytearray()
        with self.errors(name), get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            # A server that ignores Range answers 200 with the whole file: usable only from the start.
            expected = f"bytes {start}-{start + count - 1}/{size}"
            found = response.headers.get("content-range")
            if (response.status_code == 206 and found != expected) or (response.status_code != 206 and start):
                raise CheckpointError(
                    f"The Hub answered the request for {expected} of {self.path(name)} with "
                    f"{found or response.status_code}. Try again, or download the checkpoint and give the folder."
                )
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= count:
                    break
        if len(data) < count:
            raise TransientError(f"The Hub sent {len(data)} of {count} bytes of {self.path(name)}. Try again.")
        return bytes(data[:count])

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Put every failure of huggingface_hub and the network into a sentence."""
        from huggingface_hub import errors

        http_error: Any = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
        try:
            yield
        except CheckpointError:
            raise
        except (http_error, errors.HFValidationError, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise StoppedError(
                    f"{what} of {self.where} cannot be written: {getattr(error, 'strerror', error)}. Free space and run the same command again."
                ) from None
            status = getattr(getattr(error, "response", None), "status_code", None)
            offline = isinstance(error, errors.OfflineModeIsEnabled)
            kind = TransientError if status in TRANSIENT_STATUS and not offline else CheckpointError
            raise kind(self._sentence(what, error, status)) from error

    def _sentence(self, what: str, error: Exception, status: int | None) -> str:
        from huggingface_hub import errors

        start = f"{self.repo} is no folder here, and on the Hub"
        if isinstance(error, errors.GatedRepoError):
            return f"{start} it is gated: accept its terms on its page, log in with `hf auth login`, and try again."
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{start} it has no revision of that name ({self.where}): give a branch, tag or commit that exists."
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
            return (
                f"{start} it does not exist or is not open to you ({status}): "
                f"check the name, or log in with `hf auth login`."
            )
        if status is not None:
            return f"The Hub answered {status} when asked for {what} of {self.where}: try again later."
        if isinstance(error, errors.OfflineModeIsEnabled):
            return f"{self.where} is no folder here, and HF_HUB_OFFLINE forbids asking the Hub: give a local folder."
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"{self.repo} is no folder here, and the Hub could not be asked for {what} of {self.where} ({reason}): "
            f"check the path, or the network."
        )
