"""Errors for the person who reads them: what is wrong, where, and what to do.

Every command prints `str(error)` and leaves with `error.exit_code`; a traceback is a defect of m3quant.
"""

from collections.abc import Mapping
from types import MappingProxyType


class M3QuantError(Exception):
    """Base of all refusals. The message is one sentence (or two) with the file, the tensor and the remedy.

    facts: what --json tells beside the message.
    """

    exit_code = 2
    facts: Mapping[str, object] = MappingProxyType({})


class CheckpointError(M3QuantError):
    """A source or output checkpoint is broken, incomplete, or of a kind we do not read."""


class DamagedOutput(CheckpointError):
    """A finished output of m3quant is not as it was written: a check that failed, not a wrong input."""

    exit_code = 1


class RecipeError(M3QuantError):
    """A recipe names an unknown role, scheme or key, or does not parse."""


class PlanError(M3QuantError):
    """Recipe and checkpoint do not go together: an engine rule is broken or a size does not divide."""


class CalibrationError(M3QuantError):
    """The calibration data is unusable or too small, or a weight or activation is not finite."""


class EvaluationError(M3QuantError):
    """What was to be measured cannot be: models that do not match, a suite, gate or text that does not do."""


class NodeError(M3QuantError):
    """A serving node, dtype, parallel split or price file that is unknown or impossible."""


class DoesNotFit(M3QuantError):
    """The checkpoint cannot be served on that node as asked; the message says what would have to change."""

    exit_code = 3


class OptionError(M3QuantError):
    """An option names what is not there, or does not go with another one, with this machine, or with what is recorded."""


class PackageMissing(M3QuantError):
    """A package of an extra (m3quant[convert], for one) is not installed here."""


class EngineMissing(M3QuantError):
    """No engine is installed where it was looked for, or one that cannot serve this checkpoint."""


class ServeError(M3QuantError):
    """The engine that was started ended, did not become ready, or measured less than the plan promised."""

    exit_code = 1


class OutputError(M3QuantError):
    """The output folder cannot be used: not empty, not an output of m3quant, inside the source, or begun under other settings."""


class VerifyError(M3QuantError):
    """The output is not what the plan promised."""

    exit_code = 1


class PublishError(M3QuantError):
    """An output may not be published as it is: base or licence unknown, a file missing, a secret found, a check failed."""

    exit_code = 1


class HubError(M3QuantError):
    """The Hub refuses: no token or one that may not do this, a name that is taken, a repo that somebody else changed."""


class StoppedError(M3QuantError):
    """The run stopped early but intact (full disk or GPU, a Hub that does not answer): the same command continues it."""

    exit_code = 4


class GuardError(M3QuantError):
    """The guard cannot protect this server: a setting is wrong, or the KV cache pool is not known."""
