"""Draft models that a card points to: on the Hub, at one commit, under the licence that their own card states. None is copied."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..engines.drafts import Draft
from ..errors import PublishError
from ..families import Family
from ..runtime.draft import open_draft

_LICENCE = re.compile(r"[\w .+()-]{1,120}")  # what stands in a cell of the card's table


def referenced(drafts: Sequence[str], family: Family) -> list[Draft]:
    """The drafts named as ORG/NAME[@REVISION]. Raises PublishError for a folder or one without a licence, CheckpointError as `open_draft`."""
    found = []
    for name in drafts:
        draft = open_draft(name, family)
        if draft.revision is None:
            raise PublishError(
                f"--draft {name} is a folder: a card points to a draft on the Hub, by ORG/NAME or ORG/NAME@REVISION."
            )
        if not _LICENCE.fullmatch(draft.licence):
            raise PublishError(
                f"{name} states no licence in its card: leave --draft {name} out, or ask who made it to state one."
            )
        found.append(draft)
    return found
