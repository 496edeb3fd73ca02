"""convert: from a source and a recipe, or a budget, to a finished output. What can be refused is refused before a tensor is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact.uploads import refuse_dropped
from ..errors import OptionError, PlanError, RecipeError
from ..extras import need
from ..planning.plan import Plan, make_plan
from ..planning.timing_model import Rates, estimate, load_rates
from ..recipe.choice import RecipeChoice
from ..recipe.recipe import CalibrationOptions, Recipe, with_data
from ..running import steps
from ..running.progress import Progress, ShowProgress, quietly
from ..running.words import size_of
from .arguments import check_count, check_file, check_place, check_serving, check_size, check_texts, check_word
from .calibration_text import TextChoice, calibration_windows
from .fitted_conversion import asked_of, fitted
from .fitting import Answer, Asked

if TYPE_CHECKING:
    import torch

    from ..calibration.mixture import Part
    from ..calibration.windows import Windows
    from ..convert.job import Settings
    from ..publish.streaming.settle import Settled
    from ..publish.streaming.wanted import Wanted


@dataclass(frozen=True)
class How:
    """How to run, as opposed to what to make: device ("auto", "cpu", "cuda", "cuda:1"), spill (hidden states on disk), ray (on all GPUs of
    the Ray cluster at `address`, or of one started on this machine), cache_disk (bytes that shards of a source on the Hub may take on
    the disk at a time; None: what is free)."""

    device: str = "auto"
    strict_coverage: bool = False
    spill: bool = False
    ray: bool = False
    address: str | None = None
    cache_disk: int | None = None

    def check(self) -> None:
        """Raise PlanError for choices that do not go together."""
        if self.address and not self.ray:
            raise PlanError("--address names a Ray cluster: give --ray with it.")
        if self.ray and ":" in self.device:
            raise PlanError(f"--device {self.device} names one GPU of this machine: with --ray give cuda, cpu or auto.")


@dataclass(frozen=True)
class Conversion:
    """A finished conversion. manifest: the output's m3quant.json. fitted: the question that its recipe answers, where one did.
    published: what is on the Hub, if that was wanted."""

    output: Path
    plan: Plan
    manifest: Mapping[str, Any]
    fitted: Answer | None = None
    published: Settled | None = None


@dataclass(frozen=True)
class Prepared:
    """A conversion whose options were checked; no tensor was read. `run` does it."""

    plan: Plan
    output: Path
    how: How
    parts: Sequence[Part] = field(repr=False)
    fitted: Answer | None = None
    publish: Wanted | None = None
    notes: tuple[str, ...] = ()  # for the user, before anything is done

    def look(self, progress: ShowProgress = quietly) -> Looked:
        """Make every check of `run` before its first weight, and say what it would find; nothing is written. Raises as `run`.

        compressed-tensors' own models are asked too: importing them takes a run's first seconds, and `verify` asks them of every output.
        """
        from ..convert.conversion import what_is_there
        from ..planning.config_models import check_config_model

        check_config_model(self.plan.quantization)
        with progress("dry run") as shown:
            settings, device, rates = self._ready(shown)
            if self.publish is not None:  # shards that leave the disk need less of it
                from ..publish.streaming.shard_uploads import ShardUploads

                settings.sink = ShardUploads(self.publish, shown)
            found = what_is_there(self.plan, self.output, settings, device, shown)
        return Looked(found, str(device), rates, settings.windows)

    def run(self, progress: ShowProgress = quietly) -> Conversion:
        """Convert, or continue an interrupted conversion; a finished one returns at once. Raises M3QuantError subclasses."""
        from ..artifact.manifest import MANIFEST
        from ..convert.conversion import rehearse, what_is_there
        from ..convert.start import convert as start

        with progress(self.plan.recipe.name) as shown:
            settings, device, rates = self._ready(shown)
            if self.publish is not None:
                from ..publish.streaming.rehearsal import check_beforehand
                from ..publish.streaming.shard_uploads import ShardUploads

                settings.sink = uploads = ShardUploads(self.publish, shown)
                # No repo is made for what has no room. A finished output takes none, and to compare it may mean to read the source.
                if not (self.output / MANIFEST).exists():
                    what_is_there(self.plan, self.output, settings, device, shown)
                steps.step("checking what will be published")
                check_beforehand(
                    self.plan,
                    self.output,
                    self.publish,
                    lambda folder: rehearse(self.plan, folder, settings),
                    shown.say,
                )
            if time := estimate(self.plan, rates):
                steps.expect(time.seconds)
            manifest = start(self.plan, self.output, settings, shown)
        if self.publish is None:
            return Conversion(self.output, self.plan, manifest, self.fitted)
        from ..publish.streaming.settle import settle

        with progress("publish") as shown:
            settled = settle(self.plan, self.output, manifest, self.publish, shown, uploads.sent)
        return Conversion(self.output, self.plan, manifest, self.fitted, settled)

    def _ready(self, shown: Progress) -> tuple[Settings, torch.device, Rates]:
        """What is needed before the first weight is read: source, output folder, device, Ray, calibration text."""
        from ..convert.conversion import check_places
        from ..convert.job import Settings
        from ..running.device import pick_device

        how = self.how
        settings = Settings(
            device=how.device, strict_coverage=how.strict_coverage, spill=how.spill, engine="ray" if how.ray else "local",
            address=how.address, cache_disk=how.cache_disk,
        )  # fmt: skip
        check_places(self.plan, self.output, settings)
        device = pick_device(how.device)
        if how.ray:
            from ..convert.ray.cluster import require_ray

            require_ray()
        for note in self.notes:
            shown.say(f"note: {note}")
        if self.plan.recipe.calibrated:
            steps.step("reading and tokenizing the calibration text")
            settings.windows = calibration_windows(self.plan, self.parts)
            for note in settings.windows.notes:
                shown.say(f"note: {note}")
        return settings, device, load_rates(on=device.type)


@dataclass(frozen=True)
class Looked:
    """What a run would find. found: in the output folder. device: it would run on; rates: of such a device. windows: its text, if any."""

    found: str
    device: str
    rates: Rates
    windows: Windows | None


def convert(
    src: str | Path,
    dst: str | Path,
    to: str | None = None,
    *,
    recipe: str | Path | None = None,
    settings: Sequence[str] = (),
    format: str | None = None,
    requantize: bool = False,
    scheme: str | None = None,
    calibration: Sequence[str] = (),
    windows: int | None = None,
    calibration_tokens: int | None = None,
    window_length: int | None = None,
    min_expert_tokens: int | None = None,
    window_lengths: str | None = None,
    strict_coverage: bool = False,
    spill: bool = False,
    device: str = "auto",
    ray: bool = False,
    address: str | None = None,
    cache_disk: int | str | None = None,
    budget: int | str | None = None,
    node: str | None = None,
    serving: Mapping[str, Any] | None = None,
    sensitivity: str | Path | None = None,
    publish: Wanted | None = None,
    progress: ShowProgress = quietly,
) -> Conversion:
    """Quantize the checkpoint `src` (a folder, or a Hub id) into the folder `dst`. Run again after any interruption: it continues.

    to, recipe, settings, format, requantize, scheme: as of `plan`. calibration: sources of text, each with "=WEIGHT" if not all count
    the same. windows (of window_length tokens) or calibration_tokens: how much. window_lengths: "one" or "mixed". min_expert_tokens: below this an expert is
    topped up, or with strict_coverage the run fails. budget ("118GB", or bytes) or node ("1xH200", with `serving`: fields of
    runtime.fit.Ask): the recipe is fitted by sensitivity, measured first where the file is not there. cache_disk ("60GB", or bytes):
    as of `How`. publish: a Hub repo to which finished shards are uploaded while later ones are made, and what must be told of the
    base (docs/publish_upload.md). Raises M3QuantError subclasses, PackageMissing among them.
    """
    check_place(src=src, dst=dst)
    check_word(
        to=to, format=format, scheme=scheme, window_lengths=window_lengths, device=device, address=address, node=node
    )
    check_file(recipe=recipe, sensitivity=sensitivity)
    check_texts(settings=settings, calibration=calibration)
    check_count(windows=windows, calibration_tokens=calibration_tokens, window_length=window_length)
    check_size(cache_disk=cache_disk, budget=budget)
    check_serving(serving)
    choice = RecipeChoice(to, None if recipe is None else Path(recipe), tuple(settings), format, requantize, scheme)
    text = TextChoice(tuple(calibration), windows, calibration_tokens, window_length, min_expert_tokens, window_lengths)
    how = How(device, strict_coverage, spill, ray, address, size_of(cache_disk))
    asked = asked_of(budget, node, serving or {}, None if sensitivity is None else Path(sensitivity), bool(choice))
    return prepare(src, dst, choice, text, how, asked, publish=publish, progress=progress).run(progress)


def prepare(
    src: str | Path,
    dst: str | Path,
    choice: RecipeChoice,
    text: TextChoice,
    how: How,
    asked: Asked | None = None,
    *,
    publish: Wanted | None = None,
    dry_run: bool = False,
    progress: ShowProgress = quietly,
) -> Prepared:
    """Check the options and plan. asked: a budget that makes the recipe; it is measured here, unless dry_run."""
    need("convert", "m3quant convert")
    how.check()
    if publish is not None and asked is not None:
        raise OptionError(
            "--budget and --fit do not go with --publish: write the recipe first (m3quant fit --recipe-out FILE) and convert with "
            "--recipe FILE."
        )
    if choice.requantize and asked is not None:
        raise RecipeError(
            "--requantize goes with a recipe (--to, --recipe): m3quant fit measures on unquantized weights."
        )
    from ..calibration.mixture import parse_mixture
    from ..convert.from_hub import open_source

    src, dst = str(src), Path(dst)
    refuse_dropped(src)
    checkpoint, moved = open_source(src, dst)
    if publish is not None:
        from ..publish.streaming.rehearsal import check_base

        check_base(checkpoint, dst, publish)
    notes = (moved,) if moved else ()
    recipe = choice.recipe(checkpoint.config) if asked is None else Recipe(rounding="feedback")
    recipe = text.laid_over(recipe, how.strict_coverage)
    parts = parse_mixture(text.sources)

    def enough(plan: Plan) -> Plan:
        chosen = text.says_how_much or plan.recipe.rounding != "feedback"
        return plan if chosen else _with_enough_text(plan, how.device)

    if asked is None:
        plan = enough(make_plan(checkpoint, recipe))
        choice.check_used(checkpoint.root, plan.recipe.requantize)
        if how.spill and not plan.recipe.calibrated:
            raise OptionError(
                f"--spill keeps the hidden states of a calibration on the disk, and {plan.recipe.name} calibrates nothing: leave it out."
            )
        if publish is not None and how.ray and plan.recipe.calibrated:
            raise PlanError(
                "--publish uploads from the process that journals, which a calibrated run on Ray starts elsewhere: leave --ray out, "
                "or run m3quant publish afterwards."
            )
        return Prepared(plan, dst, how, parts, publish=publish, notes=notes)
    asked = replace(asked, data=recipe.data.model_dump())
    found = fitted(checkpoint, src, dst, asked, enough, how.device, text.sources, dry_run, progress, how.cache_disk)
    assert found.plan is not None
    return Prepared(found.plan, dst, how, parts, found, notes=notes)


def _with_enough_text(plan: Plan, device: str) -> Plan:
    """The plan with as much of the bundled text as a GPU has time and room for, where the recipe does not say how much."""
    from ..planning.calibration_text import token_choice
    from ..running.device import device_memory, pick_device

    data, chosen = plan.recipe.data, pick_device(device)
    if data.windows != CalibrationOptions().windows or chosen.type != "cuda":
        return plan
    rates = load_rates().model_copy(update={"device_memory": device_memory(chosen)[1]})
    windows = -(-token_choice(plan, rates).tokens // data.window_length)
    return plan if windows <= data.windows else make_plan(plan.checkpoint, with_data(plan.recipe, {"windows": windows}))
