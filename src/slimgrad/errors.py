"""Every error that slimgrad raises, as one tree.

    SlimgradError
    ├── BudgetFormatError      a budget that cannot be read                    (also a ValueError)
    ├── BudgetError            no allowed plan fits the budget                 (carries the smallest peak)
    │   └── BatchTooLarge      a batch under which the step would pass it      (before anything is run)
    ├── ArgumentError          an argument of the wrong kind, or two swapped   (also a TypeError)
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

Each says what was expected, what was found and what to do next. What a step changes by itself, to stay within its
budget, is told by warnings; ``warnings.simplefilter("ignore", SlimgradWarning)`` silences them::

    SlimgradWarning            (a UserWarning)
    ├── PlanTightened          a first step was measured above the budget: the plan was made again
    ├── BatchSplit             a batch larger than planned for is run in more parts
    └── BatchUnchecked         what a larger batch needs could not be predicted
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


class BatchTooLarge(BudgetError):
    """A batch larger than the plan was made for, under which the step would pass the budget; nothing was run.

    ``predicted_bytes`` is the peak that it would have. ``largest_batch_size`` is how many samples of this shape
    fit under the plan as it is, None where that is not known.
    """

    def __init__(
        self, message: str, *, predicted_bytes: int, largest_batch_size: int | None = None
    ) -> None:
        super().__init__(message, smallest_bytes=predicted_bytes)
        self.predicted_bytes = predicted_bytes
        self.largest_batch_size = largest_batch_size


class ArgumentError(SlimgradError, TypeError):
    """An argument of the wrong kind, or two in each other's place."""


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


class SlimgradWarning(UserWarning):
    """What a step changed by itself to stay within its budget."""


class PlanTightened(SlimgradWarning):
    """A step was measured above the budget; the plan was tightened and made again."""


class BatchSplit(SlimgradWarning):
    """A batch larger than planned for is run in more micro-batches than planned."""


class BatchUnchecked(SlimgradWarning):
    """What a batch larger than planned for needs could not be predicted; it is run all the same."""
