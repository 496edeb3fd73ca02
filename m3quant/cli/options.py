"""Options that several commands share, and the recipe that they make."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

from ..engines import DEFAULT
from ..engines.base import is_release
from ..errors import OptionError
from ..families import QUANTIZABLE
from ..planning.layout import FORMATS
from ..recipe.choice import RecipeChoice
from ..recipe.recipe import every_name, fitted_names, recipe_names
from ..running.words import parse_size
from ..runtime.draft import MAX_TOKENS
from ..runtime.hardware import MAX_COUNT
from ..schemes import SCHEMES

if TYPE_CHECKING:
    from ..publish.gates import Asked

F = TypeVar("F", bound=Callable[..., Any])


class TokenCount(click.ParamType[int]):
    """A number of tokens: 786432, 786,432, 800k or 0.8M (thousands and millions)."""

    name = "tokens"
    what: ClassVar[str] = "tokens"
    units: ClassVar[dict[str, int]] = {"": 1, "k": 1_000, "m": 1_000_000}
    example: ClassVar[str] = "write for instance 786432, 800k or 0.8M"

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([\d,]{1,15}(?:\.\d{1,6})?)([kKmM]?)", str(value).strip())
        unit = self.units.get(found[2].lower()) if found else None
        if found is None or unit is None or not found[1].strip(","):
            self.fail(f"{value!r} is no number of {self.what}: {self.example}.", param, ctx)
        exact = Decimal(found[1].replace(",", "")) * unit
        if exact != (count := int(exact)):
            self.fail(f"{value!r} is no whole number of {self.what}: {self.example}.", param, ctx)
        if not self.least <= count <= MAX_COUNT:
            self.fail(f"{value!r} is not between {self.least:,} and {MAX_COUNT:,} {self.what}.", param, ctx)
        return count


class RequestCount(TokenCount):
    """A number of requests: 16."""

    name = "requests"
    what: ClassVar[str] = "requests"
    units: ClassVar[dict[str, int]] = {"": 1}
    example: ClassVar[str] = "write for instance 16"


class Length(TokenCount):
    """Tokens of a window, a request or a step: 131072, 131,072 or 128k, where k is 1,024 as in the names of models."""

    name = "length"
    units: ClassVar[dict[str, int]] = {"": 1, "k": 1024, "m": 1024**2}
    example: ClassVar[str] = "write for instance 131072 or 128k (k is 1,024)"


def _complete(names: Callable[[], list[str]]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """What a shell completes an option with."""
    return lambda ctx, param, begun: [name for name in names() if name.startswith(begun)]


def _list_recipes(ctx: click.Context, param: click.Parameter, given: bool) -> None:
    if given:
        from .recipes import command

        command.main([], standalone_mode=False)
        ctx.exit()


def outdated(old: str, instead: str) -> None:
    """Say what an option is now, and that the old spelling works for one more release."""
    click.echo(f"warning: {old} {instead}: the old spelling works in this release and not in the next.", err=True)


def primary_name(name: str) -> str:
    """How a person writes the option of the running command that its function gets as `name`: utilization -> --gpu-memory-utilization."""
    ctx = click.get_current_context(silent=True)
    parameters = ctx.command.params if ctx else []
    return next((p.opts[0] for p in parameters if p.name == name and p.opts), f"--{name.replace('_', '-')}")


class ByteCount(click.ParamType[int]):
    """A number of bytes: 8000000, 60GB or 118.4GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


class ByteRate(click.ParamType[int]):
    """Bytes a second: 1GB/s, 200MB/s or 125000000."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            rate = parse_size(str(value).strip().removesuffix("/s"))
        except ValueError as error:
            self.fail(f"{error}, followed by /s.", param, ctx)
        if not rate:
            self.fail("a network rate must be more than 0.", param, ctx)
        return rate


def cache_option(help: str) -> Callable[[F], F]:
    return click.option("--cache-disk", type=ByteCount(), metavar="SIZE", default=None, help=help)


def network_option(function: F) -> F:
    return click.option(
        "--network",
        type=ByteRate(),
        metavar="RATE",
        default=None,
        help="If SRC is on the Hub: network rate for the time estimate, e.g. 1GB/s.",
    )(function)


def recipe_options(default: str | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--to, --recipe, --set, --format and --requantize, which the function gets as one `choice`."""

    def decorate(given: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(given)
        def function(
            *args: Any,
            to: str | None,
            recipe_file: Path | None,
            settings: tuple[str, ...],
            format_name: str | None,
            requantize: bool,
            scheme: str | None,
            **others: Any,
        ) -> Any:
            choice = RecipeChoice(to, recipe_file, settings, format_name, requantize, scheme)
            return given(*args, choice=choice, **others)

        for option in reversed(
            (
                click.option(
                    "--to",
                    "to",
                    metavar="NAME",
                    default=None,
                    shell_complete=_complete(every_name),
                    help=f"Recipe that ships with m3quant: {', '.join(recipe_names())}, or one fitted to a node: "
                    f"{', '.join(fitted_names())}. m3quant recipes says what each is{f' [{default}]' if default else ''}.",
                ),
                click.option(
                    "--scheme",
                    metavar="SCHEME",
                    default=None,
                    help="One scheme for all linear layers but router and head, by llm-compressor's name or m3quant's: W4A16, FP8_DYNAMIC, "
                    "FP8_BLOCK, int4-g32, ...",
                ),
                click.option(
                    "--recipe",
                    "recipe_file",
                    type=click.Path(path_type=Path),
                    default=None,
                    help="Recipe of your own (m3quant's or llm-compressor's YAML).",
                ),
                click.option(
                    "--set",
                    "settings",
                    metavar="ROLE[@LAYERS]=SCHEME",
                    multiple=True,
                    help=f"Override one role, e.g. routed_experts=int4-g32, or one in some layers, e.g. routed_experts@3-6=int3-g128-asym. "
                    f"Roles: {', '.join(QUANTIZABLE)}. Schemes: {SCHEMES}.",
                ),
                click.option(
                    "--format",
                    "format_name",
                    type=click.Choice(FORMATS),
                    default=None,
                    help="Override the output format.",
                ),
                click.option(
                    "--requantize",
                    is_flag=True,
                    help="Accept a source whose weights are already integers (compressed-tensors, AutoAWQ): its rounding errors add to the new ones.",
                ),
                click.option(
                    "--list",
                    is_flag=True,
                    expose_value=False,
                    is_eager=True,
                    callback=_list_recipes,
                    help="List recipes, schemes and roles, and stop.",
                ),
            )
        ):
            function = option(function)
        return function

    return decorate


# Options of `plan` and `serve` that are fields of runtime.fit.Ask. None means m3quant's choice.
ASK_OPTIONS = (
    "context", "concurrency", "kv_dtype", "index_dtype", "tp", "pp", "max_num_seqs", "max_num_batched_tokens", "utilization", "vision",
)  # fmt: skip


def ask_options(function: F) -> F:
    """How a checkpoint is to be served: the fields of runtime.fit.Ask."""
    tokens, length = click.IntRange(1, MAX_COUNT), Length()
    for option in reversed((
        click.option(
            "--context", "--max-model-len", "context", type=length, default=None,
            help="Tokens of one request, prompt and answer: 131072 or 128k. [the longest that fits]",
        ),
        click.option("--concurrency", type=tokens, default=None, help="Requests of that length at once. [1]"),
        click.option("--kv-dtype", "--kv-cache-dtype", "kv_dtype", default=None, help="KV cache: auto, bfloat16, fp8, fp8_e4m3, fp8_e5m2. [auto: what the checkpoint states]"),
        click.option("--index-dtype", default=None, help="M3's index keys: bfloat16 or fp8. [bfloat16]"),
        click.option("--tp", "--tensor-parallel-size", "tp", type=tokens, default=None, help="Tensor-parallel ranks. [all GPUs, at most the KV heads]"),
        click.option("--pp", "--pipeline-parallel-size", "pp", type=tokens, default=None, help="Pipeline stages. [1, or what TP leaves]"),
        click.option("--max-num-seqs", type=tokens, default=None, help="Requests that run at once. [32, or --concurrency]"),
        click.option("--max-num-batched-tokens", type=length, default=None, help="Tokens of one engine step. [8192]"),
        click.option("--gpu-memory-utilization", "utilization", type=float, default=None, help="Share of each GPU for the engine. [0.92]"),
        click.option("--vision/--language-model-only", "vision", default=None, help="Serve images too, or text alone. [text alone]"),
    )):  # fmt: skip
        function = option(function)
    return function


def draft_options(function: F) -> F:
    """A draft model for speculative decoding: `runtime.draft.open_draft`."""
    for option in reversed((
        click.option("--draft", default=None, metavar="DRAFT", help="Draft model for speculative decoding: a folder or Hub repo (EAGLE3, DFlash, DSpark)."),
        click.option("--draft-tokens", type=click.IntRange(1, MAX_TOKENS), default=None, help="Tokens that it guesses in a step. [what the draft states, else 3]"),
    )):  # fmt: skip
        function = option(function)
    return function


def release_option(function: F) -> F:
    """--engine-release, which the function gets as `release`, the field of runtime.fit.Ask. `serve` plans for the release that is installed."""
    return click.option(
        "--engine-release", "release", callback=_release, default=None, metavar="VERSION",
        help=f"Release of {DEFAULT.title} to plan for, for instance 0.26.0. [the newest that was read]",
    )(function)  # fmt: skip


def _release(ctx: click.Context, param: click.Parameter, text: str | None) -> str | None:
    """Raises OptionError for what is no version, of which nothing would be known."""
    if text is not None and not is_release(text):
        raise OptionError(f"--engine-release {text[:40]!r} is no version: write for instance 0.33.0.")
    return text


# Options of `plan`, `serve` and `bench` that are fields of runtime.fit.Ask too, and say nothing to `fit`.
OFFLOAD_OPTIONS = ("kv_offload", "weight_offload", "slow_offload")


def offload_options(function: F) -> F:
    """Host memory for cache and weights."""
    for option in reversed((
        click.option("--kv-offload", type=ByteCount(), metavar="SIZE", default=None, help="Host memory for prefixes that leave the GPU's cache, of all GPUs together: 100GiB."),
        click.option("--weight-offload", type=ByteCount(), metavar="SIZE", default=None, help="Routed experts to keep in host memory, of each GPU: 60GiB. Slow."),
        click.option("--slow-offload", is_flag=True, default=None, help="Accept --weight-offload where more GPUs cost less per token."),
    )):  # fmt: skip
        function = option(function)
    return function


def serving_options(function: F) -> F:
    """`plan`'s questions about serving."""
    for option in reversed((
        click.option("--on", default=None, metavar="NODE", help="A node: 1xH200, 2xH100, ..., or 2x95.5GiB for another card."),
        click.option("--all", "everything", is_flag=True, default=None, help="Every precision on every standard node, with prices."),
        click.option("--check-log", type=click.Path(path_type=Path), default=None, help="Compare the prediction with a vLLM start-up log."),
        click.option("--prices", type=click.Path(path_type=Path), default=None, help="Price file (YAML) instead of the one in the package."),
    )):  # fmt: skip
        function = option(function)
    return ask_options(release_option(draft_options(offload_options(function))))


def publish_options(function: F) -> F:
    """What the user must tell `card` and `publish` about the base if its download did not record it."""
    source = click.option(
        "--source", default=None, help="Folder or Hub id of the base: files and tensors are compared with it."
    )
    return base_options(source(function))


def base_options(function: F) -> F:
    """What must be told of the base and its licence, and of what the scan may find."""
    for option in reversed(
        (
            click.option("--base-repo", metavar="ORG/NAME", default=None, help="Hub repo of the base model."),
            click.option("--base-revision", metavar="COMMIT", default=None, help="Its commit, 40 hex digits."),
            click.option(
                "--licence-file",
                type=click.Path(path_type=Path),
                default=None,
                help="Licence text of a base that carries none.",
            ),
            click.option(
                "--licence-id",
                metavar="ID",
                default=None,
                help="Hub identifier of a licence that m3quant does not know (apache-2.0, other, ...).",
            ),
            click.option(
                "--licence-name", metavar="NAME", default=None, help="The Hub's license_name, with --licence-id other."
            ),
            click.option(
                "--allow",
                type=click.Path(path_type=Path),
                default=None,
                help="YAML list of what the scan finds and is harmless: text (a regex), reason, and optionally file and kind.",
            ),
            click.option(
                "--draft",
                "drafts",
                metavar="ORG/NAME",
                multiple=True,
                help="Draft model on the Hub that the card points to, with its revision and licence.",
            ),
        )
    ):
        function = option(function)
    return function


def publish_asked(repo: str | None, given: dict[str, Any], online: bool = False) -> Asked:
    """The options of `publish_options` as the gates take them. Raises HubError or OptionError for values that are wrong anywhere."""
    from ..publish.gates import Asked
    from ..publish.licences import GivenLicence, check_given
    from ..publish.remote import check_repo_id

    if repo is not None:
        check_repo_id(repo)
    licence = GivenLicence(given["licence_file"], given["licence_id"], given["licence_name"])
    check_given(licence)
    return Asked(
        base_repo=given["base_repo"],
        base_revision=given["base_revision"],
        repo=repo,
        source=given.get("source"),
        allow=given["allow"],
        licence=licence,
        online=online,
        drafts=given["drafts"],
    )


def print_table(rows: list[list[str]]) -> None:
    """Columns as wide as their content, so that a pipe or a narrow terminal loses nothing. The first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            click.echo("  ".join("-" * width for width in widths))
