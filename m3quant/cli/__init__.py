"""The command line. One file per command, imported only when that command runs, so that `plan` stays free of torch."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NoReturn, TextIO

import click

from .. import __version__
from ..errors import M3QuantError, StoppedError
from .verbosity import NORMAL, VERBOSE, add_options, set_verbosity, verbosity

# command -> (module under m3quant.cli, the line that --help shows)
COMMANDS = {
    "plan": ("plan", "What a checkpoint is, and the size and needs of each output."),
    "fit": ("fit", "The best bits for every layer within a number of bytes, or on a node."),
    "recipes": ("recipes", "The recipes, schemes and roles that --to, --scheme and --set take."),
    "convert": ("convert", "Quantize a checkpoint to FP8 or AWQ INT4, streaming, resumable."),
    "verify": ("verify", "Check that a converted checkpoint is complete, correct and loadable."),
    "eval": ("eval", "Perplexity, KL divergence from the source and long context, one layer in memory at a time."),
    "card": ("card", "Write the model card of an output, and check that it may be published."),
    "publish": ("publish", "Put an output on the Hub: checked, licensed, private until complete."),
    "pull": ("pull", "Download a checkpoint from the Hub and verify every file."),
    "serve": ("serve", "An OpenAI-compatible endpoint on one node, planned first and guarded."),
    "bench": ("bench", "Tokens per second and latencies of a checkpoint on this machine."),
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"m3quant.cli.{COMMANDS[name][0]}")
        command: click.Command = module.command
        add_options(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="m3quant")
def cli() -> None:
    """MiniMax M3 and M2.x weights to FP8 and AWQ INT4 checkpoints that engines load as they are.

    Exit codes: 0 done, 1 a check failed or an output is damaged, 2 bad input or an unfinished output, 3 does not fit the
    node, 4 stopped by a full disk or GPU or a Hub that does not answer (the same command continues), 130 and 143 stopped
    by SIGINT and SIGTERM (the same command continues). With --json every refusal is JSON on stdout too.

    Shell completion: eval "$(_M3QUANT_COMPLETE=bash_source m3quant)" in ~/.bashrc; zsh_source and fish_source likewise.
    """
    set_verbosity(NORMAL)


# What any path that the user gives, or any disk, may return for any call: reported like m3quant's own refusals.
_UNFORESEEN = {
    **dict.fromkeys(
        (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
        M3QuantError.exit_code,
    ),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), StoppedError.exit_code),
}


def _discard(stream: TextIO | None) -> None:
    """Let the interpreter's last flush of stdout or stderr go nowhere, instead of failing once more."""
    if stream is not None:  # None: closed before we began
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _end(code: int, tell: Callable[[], None]) -> NoReturn:
    """Exit with `code`, even if the message cannot be written: a log on a full disk must not turn 4 into Python's 1."""
    try:
        tell()
    except OSError:
        _discard(sys.stderr)
    sys.exit(code)


def _tell_json(code: int, words: str, facts: Mapping[str, object]) -> None:
    """With --json a refusal is one line of JSON on stdout, beside the sentence on stderr."""
    if "--json" in sys.argv[1:]:
        click.echo(json.dumps({"error": {"message": words, "exit_code": code}, **facts}))


def main() -> None:
    """Entry point: m3quant's refusals become one line on stderr and an exit code, never a traceback."""

    def end(code: int, words: str, facts: Mapping[str, object] = MappingProxyType({})) -> NoReturn:
        def tell() -> None:
            click.echo(f"m3quant: {words}", err=True)
            _tell_json(code, words, facts)

        _end(code, tell)

    try:
        code = cli(standalone_mode=False)  # click's own handling would end a Ctrl-C with 1
    except M3QuantError as error:
        if verbosity() == VERBOSE:
            traceback.print_exc()
        end(error.exit_code, str(error), error.facts)
    except click.ClickException as error:
        refused = error

        def tell() -> None:
            refused.show()
            _tell_json(refused.exit_code, refused.format_message(), {})

        _end(error.exit_code, tell)
    except (click.Abort, KeyboardInterrupt):
        end(128 + signal.SIGINT, "stopped by SIGINT; what is finished is kept, and the same command continues.")
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        _discard(sys.stdout)
        sys.exit(1)
    except OSError as error:
        code = _UNFORESEEN.get(error.errno or 0)
        if code is None:
            raise
        if error.filename is None:  # m3quant's own stream, usually stdout; `_end` handles stderr
            _discard(sys.stdout)
        end(code, f"{error.filename or 'the output'} cannot be used: {error.strerror}.")
    sys.exit(code if isinstance(code, int) else 0)
