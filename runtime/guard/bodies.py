"""What is made of a body: here when it is small, else in its turn and in another process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from .aside import ASIDE_BYTES, Aside
from .counting import LEAST_S
from .demand import ID_NAMES, MOST_PROMPTS, TOKEN_ROUTE
from .idspan import shorten
from .inbox import Inbox
from .pool import Pool
from .reading import Reading, read_short, read_whole
from .replies import busy
from .settings import GuardSettings
from .turns import Turns


class Bodies:
    def __init__(self, settings: GuardSettings, aside: Aside) -> None:
        self.settings = settings
        self.aside = aside
        self.turns = Turns(1)  # at the process aside

    async def read(self, path: str, key: str, body: bytes, inbox: Inbox, deadline: float, pool: Pool) -> list[Reading]:
        """What a request asks for. Raises Unreadable for a body that the server is left to refuse."""
        keep_ids = self.settings.prefix_hits == "count"
        short, span = shorten(body, ID_NAMES[path == TOKEN_ROUTE])
        most = min(MOST_PROMPTS, pool.usable // pool.block_size)
        size = len(body)
        found = await self.work(key, inbox, deadline, len(short), read_short, path, short, span, size, keep_ids, most)
        if found is None:  # the long array was no prompt
            found = await self.work(key, inbox, deadline, size, read_whole, path, body, keep_ids, most)
        readings: list[Reading] = found
        return readings

    async def work(
        self, key: str, inbox: Inbox, deadline: float, size: int, function: Callable[..., Any], *arguments: Any
    ) -> Any:
        """What the function makes of `size` bytes.

        Until `deadline` (time.monotonic), but for LEAST_S at least: what else a request does before may have taken its time.
        """
        if size < ASIDE_BYTES:
            return function(*arguments)
        deadline = max(deadline, time.monotonic() + LEAST_S)
        try:
            return await self.turns.run(key, size, inbox, deadline, lambda: self.aside.run(function, *arguments))
        except TimeoutError:
            wait_s = max(self.settings.queue_timeout_s, LEAST_S)
            raise busy(
                f"The body could not be read within {wait_s:g} seconds. Please retry later.",
                "queue_timeout",
                math.ceil(self.settings.retry_after_s),
            ) from None
