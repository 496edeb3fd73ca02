"""serve: check the checkpoint, plan the node, start the engine, compare its numbers with the plan, and stay until it ends."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import m3quant

from ..artifact.journal import unfinished
from ..artifact.manifest import MANIFEST, Sums, load_manifest
from ..artifact.uploads import refuse_dropped
from ..engines import Engine, Installed, Launch, StartOptions, engine_named
from ..engines.device import CPU
from ..engines.installed import SAFE_PATH
from ..engines.rules import check_schemes
from ..errors import (
    CheckpointError,
    DamagedOutput,
    DoesNotFit,
    EngineMissing,
    OptionError,
    RecipeError,
    ServeError,
    VerifyError,
)
from .checklog import TOLERATED, LogCheck, check_log, log_reader
from .cost import load_prices
from .draft import draft_notes, with_draft
from .engine_notes import weight_notes
from .fit import Fit, assess, remedies
from .guard.settings import PREFIX, read_settings
from .hardware import STANDARD_NODES, Node, parse_node
from .launch import EngineProcess, check_port
from .model import Subject, open_subject
from .offload_price import judged
from .pins import pin_key, pinned_bytes, read_pin, write_pin
from .serve_recipe import ServeRecipe
from .this_machine import check_host, detect_node

Say = Callable[[str], None]
Planned = Callable[[int], tuple[Fit, ServeRecipe]]
"""max_num_seqs -> the verdict, and the recipe with the watermark that goes with it."""
TYPICAL_REQUEST = 8192  # tokens, prompt and answer


@dataclass(frozen=True)
class Prepared:
    """Everything decided before the engine starts."""

    subject: Subject
    fit: Fit
    recipe: ServeRecipe
    installed: Installed | None
    launch: Launch
    pin_key: str
    pin: int | None


def quick_check(src: str, subject: Subject) -> list[str]:
    """What can be known without reading weights: finished, complete, sizes as written. Returns notes. Raises CheckpointError."""
    if subject.config_only:
        raise CheckpointError(f"{src} holds a config.json but no weights: give the folder of a finished checkpoint.")
    folder = Path(src).expanduser()
    if not folder.is_dir():
        return [
            f"{src} is on the Hub: its headers were read, the engine downloads it; m3quant verify checks a local copy"
        ]
    manifest = folder / MANIFEST
    if not manifest.exists():
        return [f"{folder} has no {MANIFEST}: not written by m3quant, so only headers were checked"]
    try:
        shards = load_manifest(manifest, Sums).shards
    except ValueError as error:
        raise DamagedOutput(f"{error}: convert again, or run m3quant verify.") from None
    for name, size in ((name, shard.size) for name, shard in shards.items()):
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            raise DamagedOutput(f"{path}: {found}, {size} bytes were written: copy the checkpoint again.")
    return []


def full_check(src: str, say: Say) -> None:
    """sha256 of every shard and file against the manifest. Raises VerifyError with the first difference, CheckpointError for no output of m3quant."""
    from ..artifact.output import hash_problems, read_manifest, require_output

    folder = Path(src).expanduser()
    require_output(folder)
    manifest = read_manifest(folder)
    say(f"reading {len(manifest['shards'])} shards to check their sha256 ...")
    for problem in hash_problems(folder, manifest):
        raise VerifyError(f"{folder}: {problem}.")


def prepare(src: str, recipe: ServeRecipe, python: str | None, api_key: str | None, api_key_env: str | None, dry: bool, pinning: bool,
            say: Say, at_once: Callable[[Planned], int] | None = None) -> Prepared:  # fmt: skip
    """All decisions. `dry`: nothing need be installed here. at_once: chooses the max_num_seqs of a recipe that gives none, by what each
    would give. Raises M3QuantError where the engine would fail later."""
    if sentence := unfinished(Path(src).expanduser()):  # before the reader misses its config.json
        raise CheckpointError(sentence)
    refuse_dropped(src)
    subject = open_subject(src)
    for note in quick_check(src, subject):
        say(f"note: {note}")
    engine = engine_named(recipe.engine)
    installed = _installed(engine, python, dry)
    if installed is not None:
        for note in engine.check_family(installed, subject.family):
            say(f"warning: {note}")
    check_schemes(engine, installed, subject.stored.schemes)
    node = _node(recipe, engine, installed, dry, say)
    where = str(Path(src).expanduser().resolve()) if Path(src).expanduser().is_dir() else subject.stored.where
    ask = with_draft(recipe.ask(), subject.family, recipe.draft, recipe.draft_tokens)
    for note in draft_notes(ask.draft, engine, node.gpu) if ask.draft else ():
        say(f"note: {note}")
    ask = replace(ask, release=installed.version if installed else None)
    model, prices = replace(subject.stored, where=where), load_prices()
    if at_once is not None and recipe.max_num_seqs is None:
        whole = recipe  # before max_num_seqs is chosen

        def planned(seqs: int) -> tuple[Fit, ServeRecipe]:
            given = whole.model_copy(update={"max_num_seqs": seqs})
            tried = judged(assess(model, node, replace(ask, max_num_seqs=seqs)), prices)
            return _sized(tried, given, lambda line: None) if tried.fits else (tried, given)

        recipe = recipe.model_copy(update={"max_num_seqs": at_once(planned)})
        ask = replace(ask, max_num_seqs=recipe.max_num_seqs)
    fit = judged(assess(model, node, ask), prices)
    if installed is not None:
        engine.check_index(installed, fit.serving)
    if not fit.fits:
        tried = [] if fit.dear else [f"{r.change} (context up to {r.fit.longest_context:,})" for r in remedies(fit)]
        helps = f" It would with {', or '.join(tried)}." if tried else ""
        raise DoesNotFit(f"{src} {fit.verdict} on {node.name}: {fit.why_not}.{helps}")
    if installed is not None and not dry:
        check_host(fit)
    for note in weight_notes(fit):
        say(f"note: {note}")
    fit, recipe = _sized(fit, recipe, say)
    version = installed.version if installed else "any"
    key = pin_key(fit, version, [*engine.arguments(fit.serving), *recipe.extra])
    pin = read_pin(key) if pinning and engine.takes_pin and node.gpu.name != CPU else None
    launch = engine.launch(fit.serving, start_options(src, recipe, api_key, api_key_env, pin), installed)
    check_extra(launch, recipe.extra)
    return Prepared(subject, fit, recipe, installed, launch, key, pin)


def check_extra(launch: Launch, extra: Sequence[str]) -> None:
    """Raise RecipeError for an argument of the recipe's `extra` that the plan gives already: engines take the last, and the plan's sizes would be of the first."""
    planned = set(map(_flag, launch.arguments[: len(launch.arguments) - len(extra)]))
    repeated = [flag for flag in map(_flag, extra) if flag and flag in planned]
    if repeated:
        raise RecipeError(
            f"the recipe's 'extra' has {', '.join(repeated)}, which the plan gives: leave it out there, and set it by an option or a key of its own."
        )


def _flag(argument: str) -> str:
    """The name of a flag as engines' parsers take it; '' for a value."""
    return argument.partition("=")[0].replace("_", "-") if argument.startswith("--") else ""


def start_options(
    src: str, recipe: ServeRecipe, api_key: str | None, api_key_env: str | None, pin: int | None
) -> StartOptions:
    """Raises what `guard_environment` raises."""
    return StartOptions(
        host=recipe.host,
        port=recipe.port,
        folder=Path(src).expanduser(),
        served_name=recipe.served_name,
        guard=guard_environment(recipe) if recipe.guard and engine_named(recipe.engine).has_guard else None,
        api_key=api_key,
        api_key_env=api_key_env,
        pin=pin,
        start_timeout=recipe.start_timeout,
        shutdown_timeout=recipe.shutdown_timeout,
        watermark=recipe.watermark,
        extra=tuple(recipe.extra),
    )


def guard_environment(recipe: ServeRecipe) -> dict[str, str]:
    """The guard's variables, the rule of its reservations among them. Raises RecipeError for a key in the recipe, GuardError for what the guard would refuse once all weights are loaded."""
    env = {f"{PREFIX}{name.upper()}": str(value) for name, value in recipe.guard_settings.items()}
    if f"{PREFIX}API_KEYS" in env:  # not repeated here: commands, recipes and the files for other managers are shown
        raise RecipeError(
            "guard_settings holds API keys, which would be printed: name their variable with --api-key-env."
        )
    env.setdefault(f"{PREFIX}WATERMARK", f"{recipe.watermark:g}")
    env[f"{PREFIX}RESERVE"] = read_settings({**os.environ, **env}).reserve
    return env


def _installed(engine: Engine, python: str | None, dry: bool) -> Installed | None:
    """What is installed; None in a dry run on a machine that has none."""
    try:
        return engine.find(python)
    except EngineMissing:
        if dry and python is None:
            return None
        raise


def _node(recipe: ServeRecipe, engine: Engine, installed: Installed | None, dry: bool, say: Say) -> Node:
    cpu = installed is not None and installed.is_cpu
    if recipe.node is None:
        if installed is None:  # in a dry run only
            say(
                f"note: no engine is installed here: this is the command for {STANDARD_NODES[0]}; --on names another node"
            )
            return parse_node(STANDARD_NODES[0])
        return detect_node(cpu)
    asked = parse_node(recipe.node)
    if dry:
        return asked
    if (asked.gpu.name == CPU) != cpu:
        have = f"{engine.title}'s CPU build" if cpu else "a GPU build of the engine"
        raise OptionError(
            f"--on {recipe.node} does not go with {have} ({installed.python if installed else ''}): name another engine or node."
        )
    if asked.gpu.name == CPU:
        return asked
    here = detect_node(cpu) if installed else asked
    if here.count < asked.count or here.gpu.total_bytes < 0.99 * asked.gpu.total_bytes:
        raise OptionError(
            f"--on {recipe.node}, but this machine has {here.name} ({here.gpu.total_bytes / 2**30:.1f} GiB each): plan for that one."
        )
    return asked


def _sized(fit: Fit, recipe: ServeRecipe, say: Say) -> tuple[Fit, ServeRecipe]:
    """Context, watermark and max-num-seqs that go together.

    Blocks under the watermark are never given out at admission, so a request that needs them would wait for ever: where the context
    is chosen by serve it leaves them free, and if it was given the watermark is reduced. max-num-seqs, unless given, is no larger than
    the pool has room for requests of TYPICAL_REQUEST tokens.
    """
    blocks, block = fit.pool.blocks - 1, fit.pool.block_size
    ahead = math.ceil(fit.setup.draft_slots / block)
    free = blocks - recipe.concurrency * (math.ceil(fit.context / block) + ahead)
    if free < math.ceil(recipe.watermark * fit.pool.blocks):
        if recipe.context is None:
            each = (blocks - math.ceil(recipe.watermark * fit.pool.blocks)) // recipe.concurrency
            context = (each - ahead) * block
            fit = assess(fit.model, fit.node, replace(fit.ask, context=max(block, context)))
        else:
            watermark = max(0, math.floor(1000 * (free - 1) / fit.pool.blocks) / 1000)
            say(
                f"note: the watermark is {watermark:g} in place of {recipe.watermark:g}: a context of {fit.context:,} needs the blocks it would keep free"
            )
            recipe = recipe.model_copy(update={"watermark": watermark})
    return (fit if recipe.max_num_seqs is not None else _with_useful_seqs(fit, recipe)), recipe


def _with_useful_seqs(fit: Fit, recipe: ServeRecipe) -> Fit:
    typical = fit.pool.concurrency(min(fit.context, TYPICAL_REQUEST))
    useful = max(recipe.concurrency, min(fit.setup.max_num_seqs, typical), 1)
    ask = replace(fit.ask, max_num_seqs=useful)
    smaller = assess(fit.model, fit.node, ask)  # less sampler and graph memory: it fits at least as well
    return smaller if smaller.fits else fit


@contextmanager
def importable(installed: Installed, launch: Launch) -> Iterator[dict[str, str]]:
    """The launch's environment, with a folder on PYTHONPATH that holds only m3quant where the engine's Python lacks it.

    The guard runs inside the engine; putting our site-packages on its path would replace the engine's own libraries.
    """
    env = {**launch.env, **SAFE_PATH}
    if not launch.guarded or installed.has_m3quant:
        yield env
        return
    folder = Path(tempfile.mkdtemp(prefix="m3quant-path-"))
    try:
        package = folder / "m3quant"
        package.mkdir()
        for entry in Path(next(iter(m3quant.__path__))).iterdir():
            if entry.name != "__pycache__":
                (package / entry.name).symlink_to(entry)
        path = os.pathsep.join(part for part in (str(folder), os.environ.get("PYTHONPATH", "")) if part)
        yield {**env, "PYTHONPATH": path}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_guard() -> None:
    """Raise EngineMissing if this installation has no guard."""
    if importlib.util.find_spec("m3quant.runtime.guard") is None:
        raise EngineMissing(
            "this m3quant has no guard (m3quant.runtime.guard): install it whole, or serve without it with --no-guard."
        )


def compare(prepared: Prepared, log_text: str) -> LogCheck:
    """The engine's numbers compared with the plan's. Raises ServeError if the pool is more than 5 % below what was promised."""
    fit = prepared.fit
    reader = log_reader(fit.ask.engine)
    log = reader.read(log_text)
    if log.pool_tokens is None:
        raise ServeError(
            f"the engine printed no KV cache size, so the plan cannot be checked: use a {fit.engine.title} of {reader.releases}."
        )
    check = check_log(fit.model, log, fit.node, fit.ask)
    promised = fit.pool.engine_tokens(log.max_model_len or fit.context)
    if log.pool_tokens < promised * (1 - TOLERATED):
        off = [
            f"{line.name} {line.measured:,.2f} against {line.predicted:,.2f} {line.unit}"
            for line in check.lines
            if not line.holds
        ]
        raise ServeError(
            f"the engine holds {log.pool_tokens:,} KV tokens, {1 - log.pool_tokens / promised:.0%} fewer than the {promised:,} planned, and was "
            f"stopped: {'; '.join(off) or 'no single line is off'}. Give a smaller --context, or correct the constant (plan --check-log)."
        )
    return check


class Stopping:
    """SIGTERM and SIGINT as an event, for as long as an engine runs. A second signal changes nothing: the drain has a limit.

    signal: the number of the first that came, 0 before.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self.signal = 0

    def __enter__(self) -> threading.Event:
        self._old = {number: signal.signal(number, self._set) for number in (signal.SIGTERM, signal.SIGINT)}
        return self.event

    def _set(self, number: int, frame: Any) -> None:
        self.signal = self.signal or number
        self.event.set()

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Ready:
    """A serving engine. check is None for an engine whose log is not compared."""

    url: str
    check: LogCheck | None
    pinned: Path | None


def check_start(prepared: Prepared) -> None:
    """Raise EngineMissing or OptionError for what would stop the start: no guard here, a port that is taken."""
    if prepared.launch.guarded:
        check_guard()
    check_port(prepared.recipe.host, prepared.recipe.port)


@contextmanager
def started(
    prepared: Prepared, log: Path, echo: Say | None, stopped: threading.Event, pinning: bool
) -> Iterator[tuple[EngineProcess, Ready | None]]:
    """The engine, ready and judged; None where `stopped` was set before it was ready. At the end all its processes are stopped.

    Raises ServeError for an engine that does not become ready, or measures less than the plan promised.
    """
    recipe, installed, engine = prepared.recipe, prepared.installed, prepared.fit.engine
    assert installed is not None
    host = "127.0.0.1" if recipe.host in ("0.0.0.0", "") else "[::1]" if recipe.host == "::" else recipe.host
    url = f"http://{host}:{recipe.port}"
    with importable(installed, prepared.launch) as env:
        process = EngineProcess(prepared.launch.command, env, log, echo, engine.reason)
        try:
            ready = process.wait_ready(f"{url}/health", recipe.start_timeout, stopped)
            yield process, _judge(prepared, process, url, pinning) if ready else None
        finally:
            process.stop(recipe.shutdown_timeout)


def serve(
    prepared: Prepared, log: Path, echo: Say | None, say: Say, on_ready: Callable[[Ready], None], pinning: bool
) -> int:
    """Run until the engine ends or a signal comes. 0: stopped by a signal, drained. Raises ServeError for everything else, OptionError before the start."""
    check_start(prepared)
    with Stopping() as stopped, started(prepared, log, echo, stopped, pinning) as (process, ready):
        if ready is not None:
            on_ready(ready)
            code = process.wait(stopped)
            if code is not None:
                why = prepared.fit.engine.reason(process.text)
                raise ServeError(f"the engine ended with exit code {code} while serving: {why}. Log: {log}")
        say(f"stopping: running requests have {prepared.recipe.shutdown_timeout} s to end")
    return 0


def _judge(prepared: Prepared, process: EngineProcess, url: str, pinning: bool) -> Ready:
    if prepared.fit.engine.log is None:
        return Ready(url, None, None)
    check = compare(prepared, process.text)
    size = (
        pinned_bytes(check.log)
        if pinning and prepared.fit.engine.takes_pin and prepared.pin is None and prepared.fit.node.gpu.name != CPU
        else None
    )
    return Ready(url, check, write_pin(prepared.pin_key, size, prepared.fit) if size else None)
