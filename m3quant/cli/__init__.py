"""The command line. One file per command, imported only when that command runs, so that `plan` stays free of torch."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys

import click

from .. import __version__
from ..errors import M3QuantError, StoppedError

# command -> (module under m3quant.cli, the line that --help shows)
COMMANDS = {
    "plan": ("plan", "What a checkpoint is, and what each output would weigh and need."),
    "convert": ("convert", "Quantize a checkpoint to FP8 or AWQ INT4, streaming, resumable."),
    "verify": ("verify", "Check that a converted checkpoint is whole, right and loadable."),
    "eval": ("eval", "Perplexity, KL divergence from the source and long context, one layer in memory at a time."),
    "card": ("card", "Write the model card of an output, and check that it may be published."),
    "publish": ("publish", "Put an output on the Hub: checked, licensed, private until it is whole."),
    "pull": ("pull", "Download a checkpoint from the Hub and verify every file."),
    "serve": ("serve", "An OpenAI-compatible endpoint on one node, planned first and guarded."),
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
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="m3quant")
def cli() -> None:
    """MiniMax M3 and M2.x weights to FP8 and AWQ INT4 checkpoints that engines load as they are.

    Exit codes: 0 done, 1 a check failed, 2 bad input, 3 does not fit the node,
    4 stopped by a full disk or GPU or a Hub that does not answer (the same command continues),
    130 and 143 stopped by SIGINT and SIGTERM (the same command continues).
    """


# What any path that a person gives, or any disk, may answer to any of our calls: told like a refusal of ours.
_UNFORESEEN = {
    **dict.fromkeys(
        (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
        M3QuantError.exit_code,
    ),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), StoppedError.exit_code),
}


def _discard_output() -> None:
    """Let the interpreter's last flush of stdout go nowhere, instead of failing once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Entry point: refusals of ours become one line on stderr and an exit code, never a traceback."""
    try:
        code = cli(standalone_mode=False)  # click's own handling would end a Ctrl-C with 1
    except M3QuantError as error:
        click.echo(f"m3quant: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo(
            "m3quant: stopped by SIGINT; what is finished is kept, and the same command continues.",
            err=True,
        )
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        _discard_output()
        sys.exit(1)
    except OSError as error:
        code = _UNFORESEEN.get(error.errno or 0)
        if code is None:
            raise
        if error.filename is None:  # of the streams, stdout alone is ours to fill
            _discard_output()
        click.echo(f"m3quant: {error.filename or 'the output'} cannot be used: {error.strerror}.", err=True)
        sys.exit(code)
    sys.exit(code if isinstance(code, int) else 0)
