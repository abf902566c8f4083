"""Every error that slimgrad raises, as one tree.

    SlimgradError
    ├── BudgetFormatError      a budget that cannot be read                    (also a ValueError)
    ├── BudgetError            no allowed plan fits the budget                 (carries the smallest peak)
    ├── LossError              the loss is not a scalar with a gradient
    │   └── NonFiniteLoss      the loss of a step is NaN or infinite           (the state is kept)
    ├── BatchError             an empty batch, or one on another device than the model
    ├── ModelError             a model that cannot be trained (nothing requires a gradient)
    ├── UnsupportedError       something that is refused, with its reason
    ├── PlanError              a plan that cannot be used
    │   └── FingerprintError   a plan made for another model
    ├── MethodError            a method that is unknown or whose fields are out of bounds
    ├── VerificationError      the applied plan did not pass its checks        (everything undone)
    └── StorageError           a file that is damaged or incomplete
        ├── CheckpointError    a checkpoint that is cut short or altered
        ├── GgufError          a GGUF file whose header does not agree with its size
        └── LoadError          a model or a text that cannot be found or read

Each says what was expected, what was found and what to do next.
"""

from __future__ import annotations


class SlimgradError(Exception):
    """The root of the tree."""


class BudgetFormatError(SlimgradError, ValueError):
    """A budget that is not a positive size, a percentage or ``"min"``."""

    def __init__(self, value: object) -> None:
        super().__init__(
            f"cannot read {value!r} as a memory budget: give a positive number of bytes, a size "
            "('800MiB', '1.5GiB'), a share of the plain peak ('40%', at most 100%), or 'min'"
        )


class BudgetError(SlimgradError):
    """No allowed plan fits the budget.

    ``smallest_bytes`` is the smallest peak that the allowed rung reaches; ``by_rung`` maps each looser rung
    to the smallest peak that it would reach, in bytes.
    """

    def __init__(
        self, message: str, *, smallest_bytes: int, by_rung: dict[str, int] | None = None
    ) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes
        self.by_rung = dict(by_rung or {})


class LossError(SlimgradError):
    """The loss function did not return a scalar tensor with a gradient."""


class NonFiniteLoss(LossError):
    """The loss of a step is NaN or infinite; parameters and optimizer state were left as they were."""


class BatchError(SlimgradError):
    """A batch that is empty or lies on another device than the model."""


class ModelError(SlimgradError):
    """A model that cannot be trained."""


class UnsupportedError(SlimgradError):
    """Something slimgrad refuses to do, with its reason."""


class PlanError(SlimgradError):
    """A plan that cannot be read or used."""


class FingerprintError(PlanError):
    """A plan made for a model, optimizer or batch of another shape."""


class MethodError(SlimgradError):
    """A method that is unknown, or whose fields are out of bounds."""


class VerificationError(SlimgradError):
    """The applied plan did not pass its checks; everything was undone. ``report`` tells which."""

    def __init__(self, message: str, *, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class StorageError(SlimgradError):
    """A file that is damaged or incomplete."""


class CheckpointError(StorageError):
    """A checkpoint that is cut short, altered or absent."""


class GgufError(StorageError):
    """A GGUF file whose header does not agree with the file."""


class LoadError(StorageError):
    """A model or a text that cannot be found or read."""
