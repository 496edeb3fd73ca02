"""The protocol through which the rest of m3quant uses an engine. Torch-free; no engine is imported."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from packaging.version import InvalidVersion, Version

from ..checkpoint.strict_json import shown
from ..errors import EngineMissing
from ..families import Family
from ..schemes import Scheme
from .bench import BenchRun, Measured
from .device import Gpu
from .drafts import Draft
from .failures import Sentence, no_room, reason
from .installed import Installed, find_python, read_installed
from .integers import is_narrow
from .memory import MemoryModel
from .offload import Offload
from .start_log import LogReader


@dataclass(frozen=True)
class Capabilities:
    """What releases of an engine can do, by the first that can; '' where none can, None if it was not checked.

    read: the releases whose source was read, first and first beyond. narrow_integers: integers of other widths than 4 and 8
    bits; narrow_integers_by: where, and by what.
    fp8_index: FP8 index keys on GPUs other than data-centre Blackwells. no_zero_points: in words, the releases that stop at
    routed experts with zero points in compressed-tensors.
    """

    read: tuple[str, str] | None = None
    narrow_integers: str = ""
    narrow_integers_by: str = ""
    fp8_index: str | None = None
    no_zero_points: str = ""


@dataclass(frozen=True)
class Serving:
    """A model on a node as the plan decided it, in sizes of one engine process. kv_dtype, index_dtype: resolved names.

    where: a folder or a Hub id. kv_offload: bytes of host memory for cache, of all ranks; weight_offload: for weights, of each. static_fraction: the share of the GPU's memory that weights and cache may take together.
    """

    where: str
    family: Family
    config: Mapping[str, Any]
    gpu: Gpu
    context: int
    tp: int
    pp: int
    expert_parallel: bool
    vision: bool
    kv_dtype: str
    kv_dtype_asked: bool
    index_dtype: str
    utilization: float
    static_fraction: float
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    draft: Draft | None = None
    kv_offload: int = 0
    weight_offload: int = 0


@dataclass(frozen=True)
class StartOptions:
    """What does not follow from the plan. guard: the guard's environment, None without it; pin: bytes of KV cache per GPU.

    folder: the checkpoint's, if it is local; api_key_env: the name of the variable that holds api_key.
    """

    host: str
    port: int
    folder: Path
    served_name: str | None = None
    guard: Mapping[str, str] | None = None
    api_key: str | None = None
    api_key_env: str | None = None
    pin: int | None = None
    start_timeout: int = 3600
    shutdown_timeout: int = 60
    watermark: float = 0.0
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """A command ready to run. program: what an image of the engine has as its entry point; env: what is added to the environment,
    secrets among it under `secret` names; notes: said to the user; guarded: whether m3quant's guard runs inside."""

    program: list[str]
    arguments: list[str]
    env: dict[str, str]
    secret: frozenset[str]
    notes: list[str]
    guarded: bool = False

    @property
    def command(self) -> list[str]:
        return [*self.program, *self.arguments]

    def public_env(self) -> dict[str, str | None]:
        """The environment without its keys."""
        return {name: None if name in self.secret else value for name, value in self.env.items()}

    def shown(self, quote: Callable[[str], str], api_key_env: str | None) -> str:
        """A shell line, with the environment before it; the key as the variable that the user named."""
        env = [
            f"{name}=${api_key_env}" if name in self.secret else f"{name}={quote(value)}"
            for name, value in self.env.items()
        ]
        return " ".join([*env, *map(quote, self.command)])


@dataclass(frozen=True)
class LoadingProbe:
    """A script that loads a checkpoint in the engine's own Python and accounts for every weight (`probing.run_probe`).

    facts: what the script must know of a family, JSON-able. no_memory, kernel: lines of its output.
    """

    script: Path
    facts: Callable[[Family], dict[str, Any]]
    no_memory: re.Pattern[str]
    kernel: re.Pattern[str]


class Engine(ABC):
    """One engine. An instance has no state; what is installed is an `Installed`, which `find` gives."""

    name: ClassVar[str]  # in options, recipes and families; also its Python package
    title: ClassVar[str]  # in sentences
    argument_files: ClassVar[tuple[str, ...]]  # of its package, as globs: where its flags are written
    can: ClassVar[Capabilities]
    sentences: ClassVar[tuple[Sentence, ...]]
    log_prefix: ClassVar[re.Pattern[str] | None] = None
    log: ClassVar[LogReader | None] = None  # None: its log is not compared with the plan
    probe: ClassVar[LoadingProbe | None] = None
    has_guard: ClassVar[bool] = False  # whether m3quant's guard runs inside its server
    takes_pin: ClassVar[bool] = False  # whether a measured cache size can be given back to it
    has_bench: ClassVar[bool] = False  # whether its own load generator is driven here

    # --- what is installed ---

    def find_python(self, explicit: str | None = None) -> str:
        """The Python that has this engine (`installed.find_python`). Raises EngineMissing."""
        return find_python(self.name, self.title, explicit)

    def find(self, explicit: str | None = None) -> Installed:
        """What that Python has. Raises EngineMissing."""
        return read_installed(self.name, self.argument_files, self.find_python(explicit))

    # --- what a release can do ---

    @abstractmethod
    def memory_of(self, release: str | None) -> MemoryModel:
        """The constants of a release; None for the newest that was read."""

    @property
    def memory(self) -> MemoryModel:
        """Those of the newest: also what all releases share, such as the names of dtypes and the defaults."""
        return self.memory_of(None)

    def check_family(self, installed: Installed, family: Family) -> list[str]:
        """Warnings about this release. Raises EngineMissing where it is too old for the family."""
        if self.can.read is None:
            return []
        needed = family.in_engine(self.name).first_release
        if needed and precedes(installed.version, needed):
            raise EngineMissing(
                f"{self.title} {installed.version} does not have {family.model_type}: install {needed} or newer."
            )
        return self.unread(installed.version)

    def unread(self, release: str) -> list[str]:
        """A warning where this was not written for the release."""
        if self.can.read is None:
            return []
        first, beyond = self.can.read
        try:
            if Version(first) <= Version(release) < Version(beyond):
                return []
        except InvalidVersion:
            return [f"{self.title} calls itself '{release}': its version was not checked against the checkpoint"]
        return [
            f"{self.title} {release} is outside the releases this was written for ({first} to before {beyond}): check what it measures"
        ]

    def release_refusal(self, family: Family, schemes: Collection[Scheme], release: str | None) -> str:
        """Why a release does not load a checkpoint of the family with these schemes, and what to do; '' where nothing is known against it."""
        first = self.first_release(family, schemes)
        if not first or not precedes(release, first):
            return ""
        return f"{self.title} {release} does not read it, {first} is the first that does: install that or a newer one"

    def index_refusal(self, gpu: Gpu, release: str | None) -> str:
        """The same of FP8 index keys on this device."""
        return ""

    def first_release(self, family: Family, schemes: Collection[Scheme]) -> str:
        """The oldest release that reads such a checkpoint of the family; '' where every known one does."""
        narrow = self.can.narrow_integers if any(map(is_narrow, schemes)) else ""
        return max(family.in_engine(self.name).first_release, narrow, key=lambda v: Version(v or "0"))

    def checkpoint_refusal(self, config: Mapping[str, Any], release: str | None) -> str:
        """Why the engine does not load a checkpoint with this config.json as it is, and what to do; '' where it does. release: of the one
        that is installed, None for the newest that was read."""
        return ""

    def draft_refusal(self, draft: Draft, family: Family, gpu: Gpu, pp: int, release: str | None) -> str:
        """Why the engine does not run this draft before this target, and what to do; '' where it does. release: as above."""
        return f"{self.title} is not given a draft here: leave --draft out"

    def batch_refusal(self, sequences: int, tokens: int) -> str:
        """Why it does not start with so many sequences at once and tokens in a step, and what to do; '' where it does."""
        return ""

    def offload_refusal(self, offload: Offload) -> str:
        """Why the engine cannot keep this in host memory, and what to do; '' where it can."""
        return f"{self.title} is not given host memory here: leave --kv-offload and --weight-offload out"

    def draft_sampling_fault(self, draft: Draft, gpu: Gpu) -> str:
        """What goes wrong there with this draft at a temperature above 0, and what to do; '' where nothing is known to."""
        return ""

    def expert_refusal(self, scheme: Scheme) -> str:
        """Why no release of this engine runs routed experts in the scheme, '' where one does."""
        return ""

    def expert_notes(self, experts: Collection[Scheme]) -> tuple[str, ...]:
        """What the user must know of releases before serving routed experts in these schemes, whatever the family."""
        return ()

    def activation_notes(self, family: Family, experts: Collection[Scheme], fmt: str) -> tuple[str, ...]:
        """The same of the experts' activation. fmt: the checkpoint's format, or its quant_method."""
        return ()

    def lookup_problems(
        self, family: Family, quantization: Mapping[str, Any], modules: Mapping[str, Scheme]
    ) -> list[str]:
        """Where this engine would look a module's scheme up in `quantization_config` and find another than in `modules`."""
        return []

    def check_index(self, installed: Installed, serving: Serving) -> None:
        """Raise EngineMissing for index keys that this release cannot keep on this device as asked."""
        return

    # --- its command ---

    @abstractmethod
    def plain_command(self, where: str) -> list[str]:
        """The shortest command that serves the model; `where` is its last word."""

    @abstractmethod
    def arguments(self, serving: Serving) -> list[str]:
        """What follows the model: flags that every release with the family takes."""

    def command(self, serving: Serving) -> list[str]:
        """What the user types to serve it as planned."""
        return [*self.plain_command(serving.where), *self.arguments(serving)]

    def command_for(self, command: list[str], where: str) -> list[str]:
        """`command` for the same model in another place. Raises ValueError for what `self.command` did not give."""
        plain = self.plain_command(where)
        if command[: len(plain) - 1] != plain[:-1] or len(command) < len(plain):
            raise ValueError(f"no {' '.join(plain[:-1])} command: {shown(' '.join(command))}")
        return [*plain, *command[len(plain) :]]

    @abstractmethod
    def launch(self, serving: Serving, options: StartOptions, installed: Installed | None) -> Launch:
        """All of it, ready to run. installed None: a release that is not here, so every known flag is used.

        Raises EngineMissing where the installed release lacks a flag that is needed.
        """

    def image(self, release: str | None) -> str | None:
        """The container image of a release (None: the newest that was read); None if none is known."""
        return None

    # --- its load generator ---

    def bench_command(self, installed: Installed) -> list[str]:
        """The command of a process that makes runs (runtime/load_generator.py). Asked where `has_bench`."""
        raise NotImplementedError(f"{self.title} has no load generator here")

    def bench_arguments(self, run: BenchRun) -> list[str]:
        """What that process is told to make one run and write its result."""
        raise NotImplementedError(f"{self.title} has no load generator here")

    def bench_texts(self, texts: Sequence[str]) -> str:
        """The content of a file with prompts for its load generator."""
        raise NotImplementedError(f"{self.title} has no load generator here")

    def read_bench(self, document: Mapping[str, Any], run: BenchRun) -> Measured:
        """The result file of a run. Raises ServeError for requests that were not answered whole."""
        raise NotImplementedError(f"{self.title} has no load generator here")

    # --- what its log says ---

    def reason(self, text: str) -> str:
        """Why it did not start or stopped, as one clause; the log's last error where no known cause is found."""
        found = no_room(self.log.read(text)) if self.log else ""
        return found or reason(text, self.sentences, self.log_prefix)

    def __repr__(self) -> str:
        return f"<engine {self.name}>"


def is_release(text: str) -> bool:
    """Whether it is a version, of which something can be known."""
    try:
        Version(text)
    except ValueError:  # also for a number of more digits than Python reads
        return False
    return True


def precedes(release: str | None, first: str) -> bool:
    """Whether a release is known to come before `first`: not None, and no build that numbers itself in its own way."""
    try:
        return release is not None and Version(release) < Version(first)
    except InvalidVersion:
        return False
