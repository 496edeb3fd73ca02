"""Every refusal crosses a process (Ray, multiprocessing) and arrives as what it was."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
from collections.abc import Iterator

import pytest

import m3quant
from m3quant.errors import M3QuantError
from m3quant.running.stopping import InterruptedRun

MESSAGE = "layer 3: a weight is not finite; download the shard again."


def refusals(kind: type[M3QuantError] = M3QuantError) -> Iterator[type[M3QuantError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from refusals(below)


def made(kind: type[M3QuantError]) -> M3QuantError:
    return InterruptedRun(15, MESSAGE) if kind is InterruptedRun else kind(MESSAGE)


def test_every_refusal_survives_pickle_with_its_words_and_exit_code() -> None:
    for module in pkgutil.walk_packages(m3quant.__path__, "m3quant."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)  # classes outside errors.py are known once they are imported
    kinds = {kind.__name__: kind for kind in refusals()}
    assert {"PlanError", "StoppedError", "InterruptedRun", "TransientError", "Conflict"} <= kinds.keys()
    for kind in kinds.values():
        error = made(kind)
        error.add_note("on node 7")
        arrived = pickle.loads(pickle.dumps(error))
        assert type(arrived) is kind and str(arrived) == MESSAGE
        assert arrived.exit_code == error.exit_code and vars(arrived) == vars(error)


def test_a_server_s_own_refusal_survives_pickle() -> None:
    from m3quant.evaluate.openai_server import Refused

    arrived = pickle.loads(pickle.dumps(Refused("no logprobs here")))
    assert type(arrived) is Refused and str(arrived) == "no logprobs here"


def test_an_interrupted_run_keeps_its_signal() -> None:
    arrived = pickle.loads(pickle.dumps(InterruptedRun(2, MESSAGE)))
    assert (arrived.number, arrived.exit_code) == (2, 130)
    with pytest.raises(InterruptedRun, match="not finite"):
        raise arrived
