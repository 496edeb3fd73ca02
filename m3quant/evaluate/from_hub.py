"""An evaluation of checkpoints on the Hub: their shards while it runs (docs/hub.md)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from ..artifact.journal import Journal
from ..checkpoint.shard_plan import Step, too_small
from ..checkpoint.streaming import cache_budget, least_budget, no_shards, streamed
from ..errors import OptionError
from ..planning.streaming import EMBEDDINGS, HEAD, head_names
from ..running.progress import Progress
from ..running.stopping import StopFlag
from .models import Model

CACHE = "shards"  # in the journal's folder, one folder a model


def layer_step(layer: int) -> Hashable:
    return "layer", layer


def evaluation_steps(model: Model, done: int) -> list[Step]:
    """What is still read of a model, in order. done: finished layers."""

    def step(key: Hashable, names: Sequence[str]) -> Step:
        return Step(key, frozenset(info.shard for info in model.infos(names)))

    family = model.family
    layers = [step(layer_step(layer), model.layer_names(layer)) for layer in range(done, family.num_layers)]
    first = [] if done else [step(EMBEDDINGS, [family.embedding_name])]
    return [*first, *layers, step(HEAD, head_names(family))]


def check_cache(models: Sequence[Model], cache_disk: int | None) -> None:
    """Raise OptionError for --cache-disk without a model on the Hub, or with less than they take together."""
    if cache_disk is None:
        return
    if not any(model.reader.checkpoint.remote for model in models):
        raise OptionError(no_shards(models[0].where))
    least = sum(least_budget(model.reader.checkpoint, evaluation_steps(model, 0)) for model in models)
    if cache_disk < least:
        raise OptionError(too_small(cache_disk, least))


@contextmanager
def shards_of_hub(
    models: Sequence[Model],
    journal: Journal | None,
    cache_disk: int | None,
    to_write: int,
    stop: StopFlag,
    progress: Progress,
) -> Iterator[None]:
    """Shards of the models on the Hub come and go while the block runs; several share the disk by what each takes at least."""
    remote = [model for model in models if model.reader.checkpoint.remote]
    if not remote:
        yield
        return
    assert journal is not None, "shards from the Hub lie beside the journal"
    done = len(journal.records)
    steps = [evaluation_steps(model, done) for model in remote]
    least = [least_budget(model.reader.checkpoint, own) for model, own in zip(remote, steps, strict=True)]
    folder = journal.folder / CACHE
    budget = cache_budget(cache_disk, folder, to_write, sum(least))
    with ExitStack() as stack:
        for model, own, part in zip(remote, steps, least, strict=True):
            share, place = budget * part // sum(least), folder / model.label
            stack.enter_context(
                streamed(
                    model.reader.checkpoint, own, place, share, stop, progress, keep=True, label=f"fetch {model.label}"
                )
            )
        yield
