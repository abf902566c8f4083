"""An optimizer's update in slices, with the state of the parameters in a store.

Nothing here knows an optimizer's formula: the keys and dtypes of the state are found in what the user's optimizer
makes, and each slice is updated by the optimizer itself (``slimgrad.optimizers.step_part``). The state of the
next slices is read, and that of the last ones written, while one is computed.
"""

from slimgrad.streaming.ahead import ReadAhead
from slimgrad.streaming.slices import Cut, cuts_of
from slimgrad.streaming.state import StoredState
from slimgrad.streaming.update import GradientSlice, StreamedUpdate

__all__ = [
    "Cut",
    "GradientSlice",
    "ReadAhead",
    "StoredState",
    "StreamedUpdate",
    "cuts_of",
]
