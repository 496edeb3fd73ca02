"""verify: whether an output is whole and right, and loads in an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..artifact.output import require_converted
from ..engines.probing import find_probed
from ..errors import VerifyError
from ..extras import need
from ..publish.pull import local_copy
from ..running import steps
from ..running.progress import ShowProgress, quietly
from ..running.words import size_of
from ..verify.verification import Check, Verification
from ..verify.verification import verify as check_output
from .arguments import check_count, check_place, check_size, check_word


def _nothing(line: str) -> None: ...


def verify(
    dst: str | Path,
    source: str | Path | None = None,
    *,
    engine: bool = False,
    transformers: bool = False,
    engine_python: str | None = None,
    engine_timeout_s: float = 3600.0,
    tensor_parallel_size: int = 1,
    cache_disk: int | str | None = None,
    say: Callable[[str], None] = _nothing,
    progress: ShowProgress = quietly,
) -> Verification:
    """Check the output in the folder `dst` (or a Hub repo, which is pulled); the result's `holds` says whether all of it is right.

    source: the checkpoint it was made from; every tensor is compared with it; of a Hub id shards are fetched one after the other, and
    take at most cache_disk bytes in `dst` at a time (None: what is free). engine: load it in the engine of engine_python
    (M3QUANT_ENGINE_PYTHON, or this Python) and compare log-probabilities; transformers: in transformers, for small models.
    say: receives the check that is under way. progress: of a download, of the checks, and of shards from the Hub. Raises VerifyError or CheckpointError where there is
    nothing to check, PackageMissing for a comparison without torch.
    """
    check_place(dst=dst, **({} if source is None else {"source": source}))
    check_word(engine_python=engine_python)
    check_count(tensor_parallel_size=tensor_parallel_size)
    check_size(cache_disk=cache_disk)
    if source is not None or engine or transformers:
        need("convert", "m3quant verify with --source, --engine or --transformers")
    if engine:  # before hours of reading
        probed, engine_python = find_probed(engine_python)
    with progress("pull") as shown:
        folder = local_copy(dst, shown)
    require_converted(folder)
    with progress("verify") as shown:

        def tell(line: str) -> None:
            shown.say(line)
            say(line)

        result, plan = check_output(folder, None if source is None else str(source), tell, size_of(cache_disk), shown)
        if transformers and result.holds:
            from ..verify.transformers_reader import transformers_check

            steps.step("in transformers")
            check, result.transformers = transformers_check(folder, plan, tell)
            result.checks.append(check)
        if engine and result.holds:
            from ..verify.engine import engine_check

            steps.step(f"in {probed.title}")
            options = {"timeout_s": engine_timeout_s, "tensor_parallel_size": tensor_parallel_size}
            try:
                check, result.engine = engine_check(probed, folder, plan, engine_python, tell, **options)
            except VerifyError as error:  # it crashed: what the other checks found is still worth having
                check = Check("engine", probed.title, [str(error)])
            result.checks.append(check)
    return result
