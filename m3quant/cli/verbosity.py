"""--quiet and --verbose, which every command takes: how much of its progress a command tells. Results and refusals are always told."""

from __future__ import annotations

from collections.abc import Callable

import click

QUIET, NORMAL, VERBOSE = -1, 0, 1

_level = NORMAL


def verbosity() -> int:
    """QUIET: no progress and no notes on stderr. VERBOSE: every step on a line, and the traceback of a refusal."""
    return _level


def set_verbosity(level: int) -> None:
    global _level
    _level = level


def add_options(command: click.Command) -> None:
    """Give a command the two options, unless it has one of that name with a meaning of its own."""
    own = {name for parameter in command.params for name in parameter.opts}
    for name, level, words in (
        ("--quiet", QUIET, "No progress on stderr."),
        ("--verbose", VERBOSE, "Every step on a line of its own, and the traceback of a refusal."),
    ):
        if name not in own:
            command.params.append(
                click.Option(
                    [name], is_flag=True, expose_value=False, is_eager=True, help=words, callback=_setting(level)
                )
            )


def _setting(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(ctx: click.Context, parameter: click.Parameter, given: bool) -> None:
        if not given:
            return
        if verbosity() not in (NORMAL, level):
            raise click.UsageError("--quiet and --verbose are opposites: give one of them.")
        set_verbosity(level)

    return callback
