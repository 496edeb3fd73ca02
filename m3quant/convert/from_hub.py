"""A conversion whose source is on the Hub or in an object store: what is checked beforehand, and its shards while it runs (docs/hub.md)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from ..artifact.journal import FOLDER, Journal, begun_with
from ..checkpoint import Checkpoint
from ..checkpoint.streaming import cache_budget, no_shards, streamed
from ..errors import OptionError, PlanError
from ..planning.plan import Plan
from ..planning.resources import Resources, written_bytes
from ..planning.streaming import Progressed, ahead_of, conversion_shards, conversion_steps
from ..running.progress import Progress
from ..running.stopping import StopFlag
from .job import Settings

CACHE = "source"  # in the journal's folder: on the output's disk, and gone with the journal


def open_source(text: str, output: Path) -> tuple[Checkpoint, str | None]:
    """The checkpoint to convert into `output`, and a note. Raises CheckpointError as `Checkpoint.open`.

    A branch or tag of a Hub repo that has moved since the conversion was begun is left: it goes on with the commit that it was begun with.
    """
    checkpoint = Checkpoint.open(text)
    hub, begun = checkpoint.remote, begun_with(output)
    if (
        hub is None
        or hub.repo is None
        or begun is None
        or (begun.repo, begun.ref) != (hub.repo, hub.ref)
        or begun.revision == hub.revision
    ):
        return checkpoint, None
    note = (
        f"{hub.where} has moved to {str(hub.revision)[:12]} since the conversion into {output} was begun: continuing with "
        f"{str(begun.revision)[:12]}; for the new revision choose another folder"
    )
    checkpoint = Checkpoint.open(hub.repo, begun.revision)
    assert checkpoint.remote is not None
    checkpoint.remote.ref = hub.ref
    return checkpoint, note


def check_remote(plan: Plan, settings: Settings) -> None:
    """Raise CheckpointError, OptionError or PlanError for what cannot be read from elsewhere as asked."""
    store = plan.checkpoint.remote
    assert store is not None
    if settings.engine == "ray" and plan.recipe.calibrated:
        raise PlanError(
            f"with --ray, recipe '{plan.recipe.name}' reads a source that all nodes see, and {store.where} is on {store.kind}: download it to a "
            "shared file system and convert the folder, take a recipe without calibration, or leave --ray out."
        )
    for name in (*plan.checkpoint.shards, *_beside(plan)):
        store.sha256(name)
    if settings.cache_disk is not None:
        conversion_shards(plan, settings.cache_disk)


def check_local(checkpoint: Checkpoint, settings: Settings) -> None:
    """Raise OptionError for options that belong to a source that is elsewhere."""
    if settings.cache_disk is not None:
        raise OptionError(no_shards(checkpoint.root))


def shards_budget(plan: Plan, output: Path, settings: Settings, need: Resources) -> int:
    """Bytes that shards from elsewhere may take at a time, 0 of a folder. Raises StoppedError where the disk has no room for them."""
    if plan.checkpoint.remote is None:
        return 0
    folder = output / FOLDER / CACHE
    left = need.disk - written_bytes(output, besides=folder)
    return cache_budget(settings.cache_disk, folder, max(left, 0), conversion_shards(plan, None).least)


def shards_of_hub(
    plan: Plan, journal: Journal, budget: int, stop: StopFlag, progress: Progress
) -> AbstractContextManager[None]:
    """Its shards come and go while the block runs; of a folder nothing changes."""
    so_far = Progressed(journal.records.keys(), journal.last_boundary())
    steps = conversion_steps(plan, so_far) if plan.checkpoint.remote is not None else []
    journal.finished = lambda unit: plan.checkpoint.finish_step(("unit", unit))
    folder, ahead, others = journal.folder / CACHE, ahead_of(plan), _beside(plan)
    return streamed(plan.checkpoint, steps, folder, budget, stop, progress, keep=True, ahead=ahead, others=others)


def _beside(plan: Plan) -> list[str]:
    """Large files that are no shards and are carried over: a draft's weights."""
    store = plan.checkpoint.remote
    return [name for name in plan.copied_files if not store.is_small(name)] if store else []
