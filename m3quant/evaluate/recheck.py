"""What is read again before an interrupted evaluation continues: saved hidden states, and shards whose files changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..artifact.identity import SourceIdentity, touched
from ..artifact.journal import Journal
from ..artifact.reread import check_states, other_shards
from ..errors import OutputError
from ..running.progress import Progress
from ..running.stopping import StopFlag
from .models import Model


def recheck(
    journal: Journal, models: Sequence[Model], now: Mapping[str, SourceIdentity], stop: StopFlag, progress: Progress
) -> None:
    """Raise OutputError unless the records follow one another and models and hidden states are those of finished layers.

    now: label -> identity of each model, which differs from the journal's by stamps at most.
    """
    finished = sorted(journal.records)
    if finished != list(range(len(finished))) or len(finished) > models[0].family.num_layers:
        raise journal.damaged(f"holds records of the layers {finished[:8]}, which do not follow one another")
    if not finished:
        return
    check_states(journal.folder, journal.records[finished[-1]]["states"], journal.folder)
    for model in models:
        label = model.label
        if not (moved := touched(journal.read[label], now[label])):
            continue
        if (store := model.reader.checkpoint.remote) is not None:
            raise OutputError(
                f"{journal.folder} was begun with a {label} of which nothing says that {moved[0]} is the shard that is now on {store.kind}: "
                f"give it as it was, or remove {journal.folder} and start again."
            )
        progress.say(
            f"files of the {label} were written or moved since: reading what {len(moved)} shards gave to finished layers"
        )
        read = {layer: journal.records[layer]["read"].get(label, {}) for layer in finished}
        if other := other_shards(model.reader.checkpoint, read, model.stored_infos, moved, stop):
            raise OutputError(
                f"{journal.folder} was begun with another {label} ({', '.join(other)} held other weights when finished layers "
                f"were measured): put the earlier files back, or remove {journal.folder} and start again."
            )
