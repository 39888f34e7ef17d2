"""Named errors. Each says what was got, what was expected and what to do about it."""

from __future__ import annotations

from typing import Any


class OBCError(Exception):
    """Base class of every error this package raises on purpose.

    Args:
        message: What is wrong, in one sentence.
        got: The offending value or fact.
        expected: What would have been accepted.
        remedy: What the user can do.
    """

    def __init__(
        self,
        message: str,
        *,
        got: Any = None,
        expected: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.message, self.got, self.expected, self.remedy = message, got, expected, remedy
        parts = [message.rstrip(".")]
        if got is not None:
            parts.append(f"Got: {got}")
        if expected is not None:
            parts.append(f"Expected: {expected.rstrip('.')}")
        if remedy is not None:
            parts.append(f"Remedy: {remedy.rstrip('.')}")
        super().__init__(". ".join(parts) + ".")

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only arguments would be lost by the default pickling, which sends errors between ranks.
        return _rebuild, (type(self), self.message, self.got, self.expected, self.remedy)


def _rebuild(cls: type[OBCError], message: str, got: Any, expected: str, remedy: str) -> OBCError:
    return cls(message, got=got, expected=expected, remedy=remedy)


class SpecError(OBCError, ValueError):
    """A specification (pattern, grid, stage, calibration) that cannot be meant."""


class PatternError(SpecError):
    """A sparsity pattern or group size that does not fit the layer it is asked for."""


class ShapeError(OBCError, ValueError):
    """Tensors whose shapes, dtypes or devices do not belong together."""


class NonFiniteError(OBCError, ValueError):
    """NaN or Inf in weights, activations or Hessians."""


class NotPositiveDefiniteError(OBCError, RuntimeError):
    """A Hessian that no bounded amount of damping makes positive definite."""


class AsymmetricHessianError(OBCError, ValueError):
    """A Hessian whose two triangles differ by more than rounding."""


class CalibrationError(OBCError, RuntimeError):
    """Calibration data that cannot be used."""


class EmptyCalibrationError(CalibrationError):
    """A calibration loader that yields nothing."""


class LayerNotReachedError(CalibrationError):
    """A selected layer that no calibration batch passes through."""


class LayerNotFoundError(OBCError, LookupError):
    """A layer name, glob or type that matches nothing in the model."""


class UnsupportedLayerError(OBCError, TypeError):
    """A module that no layer adapter handles."""


class BackendError(OBCError, RuntimeError):
    """A backend that is unknown, or that this machine cannot run."""


class MissingExtraError(OBCError, ImportError):
    """An optional dependency that is not installed."""


class FingerprintError(OBCError, RuntimeError):
    """Saved progress or a file that belongs to another model, calibration or recipe."""


class StrategyError(OBCError, RuntimeError):
    """A Trainer strategy or setting under which compression would be wrong."""


class RankError(OBCError, RuntimeError):
    """A process that compresses together with others has failed, or holds other weights than they do."""


class ScheduleError(SpecError):
    """Stages that cannot run in the order, or at the time, they ask for."""


class ExportError(OBCError, RuntimeError):
    """A model that cannot be exported as asked."""


class DeviceMemoryError(OBCError, RuntimeError):
    """A device without room for what must be on it at once."""


class BudgetError(OBCError, ValueError):
    """A compression budget that cannot be met."""


class DatabaseError(OBCError, RuntimeError):
    """A database of levels with files that are missing or damaged."""


class DamagedFileError(DatabaseError):
    """A file of a database that was cut short, or changed after it was written."""
