"""Keep the optimizer's state outside the device, and stream it through small buffers during the update.

Formula: for each slice a..b of a parameter: s <- read(S[a:b]); theta[a:b], s <- optimizer(theta[a:b], g[a:b], s);
    S[a:b] <- write(s). The next slices are read, and the last ones written, while one is computed; during backward
    the first slices of the parameter whose gradient is expected next are already on their way.
Memory: optimizer_state: nothing but step counts. temporaries: num_buffers x slice_bytes for each state tensor of a
    parameter (AdamW: 2). Time: the state is read once and written once a step, less what overlaps.
Exactness: bitwise. The user's own optimizer computes each slice; where slices cut anywhere do not give the bits of
    the whole update (shown by value for each param group and dtype), a parameter is updated whole.
Limits: the optimizer must be separable (LBFGS is not). Parameters with holes in memory, and optimizers that are
    not elementwise (Adafactor), are updated whole: their state passes through memory one parameter at a time. The
    first step makes the state slice by slice and does not read ahead. optimizer.step(closure) is refused.
    optimizer.state no longer shows the tensors; optimizer.state_dict() gives all of it, and so needs memory for it.
References: Ren et al., ZeRO-Offload (arXiv 2101.06840), section 4: the state and the update leave the device.
    Rajbhandari et al., ZeRO-Infinity (arXiv 2104.07857), section 5: state in files, streamed in parts with reads,
    computation and writes overlapped. *departs:* the update is computed on the device by the user's optimizer, bit
    for bit, not by a CPU Adam; nothing is partitioned among processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.host import Host
from slimgrad.method import Block, Offer, Paper, Refusal, Scope, Undo
from slimgrad.storage import store_of
from slimgrad.streaming import StreamedUpdate
from slimgrad.types import Column, Exactness, format_bytes


@dataclass(frozen=True)
class OffloadState:
    """Optimizer state outside the device, streamed in slices of at most ``slice_bytes`` of any tensor.

    ``num_buffers`` slices are in memory at once: one is computed while the others are read or written.
    """

    slice_bytes: int = 4 * 2**20
    num_buffers: int = 2

    column: ClassVar[Column] = Column.OPTIMIZER_STATE
    exactness: ClassVar[Exactness] = Exactness.BITWISE
    scope: ClassVar[Scope] = Scope.MODEL
    paper: ClassVar[Paper] = Paper(
        title="ZeRO-Offload: Democratizing Billion-Scale Model Training",
        authors="Jie Ren, Samyam Rajbhandari, Reza Yazdani Aminabadi, Olatunji Ruwase, Shuangyan Yang, "
        "Minjia Zhang, Dong Li, Yuxiong He",
        year=2021,
        arxiv="2101.06840",
    )

    def __post_init__(self) -> None:
        if self.slice_bytes < 64:
            raise MethodError(f"slice_bytes must be at least 64, found {self.slice_bytes}")
        if self.num_buffers < 1:
            raise MethodError(f"num_buffers must be at least 1, found {self.num_buffers}")

    def offer(self, block: Block) -> Offer | Refusal:
        """The step with its state in the store: buffers instead of state, and the time to read and write it."""
        record = block.model_record
        if record.state_bytes == 0:
            return Refusal("the optimizer keeps no state")
        if record.state_in_files:
            return Refusal("the optimizer's state is already outside the device")
        if not record.separable:
            return Refusal("the optimizer was not shown to update parameters one at a time")
        seconds = record.state_bytes / record.read_bytes_s
        seconds += record.state_bytes / record.write_bytes_s
        part, buffer_bytes = 0, record.buffer_bytes
        if record.elementwise:
            part = min(self.slice_bytes, record.largest_parameter_bytes)
            buffer_bytes += self.num_buffers * record.state_tensors * part
        if record.gradients_in_files:
            buffer_bytes += 2 * part
        changed = replace(
            record,
            state_in_files=True,
            slice_bytes=part,
            buffer_bytes=buffer_bytes,
            extra_s=record.extra_s + seconds,
        )
        how = f"in slices of {format_bytes(part)}" if part else "one parameter at a time"
        return Offer(changed, f"optimizer state outside the device, updated {how}")

    def attach(self, block: Block) -> Undo:
        """Move the state to the store; raises ``StorageError``, leaving all as it was, if there is no room."""
        host = block.live
        if host.optimizer is None:
            raise MethodError("offload_state needs an optimizer: this host has none")
        streamed = StreamedUpdate(host, store_of(host), self.slice_bytes, self.num_buffers)
        try:
            streamed.take_in_all()
        except BaseException:
            streamed.bring_back()
            raise
        return _take_over(host, host.optimizer, streamed)


class _OwnStep:
    """What the user's own ``optimizer.step()`` does: the streamed update, then a step without any gradient.

    The optimizer skips parameters without a gradient, so its hooks and the schedulers' counters see one step.
    """

    def __init__(self, host: Host, streamed: StreamedUpdate) -> None:
        self._host = host
        self._streamed = streamed
        self._frees = False
        self._kept: list[tuple[Tensor, Tensor]] = []

    def finish(self) -> None:
        """What is owed when backward is over; each gradient is freed when it is used."""
        host = self._host
        if host.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(host.parameters(), host.clip_grad_norm)
        self._frees = True
        try:
            if host.optimizer is not None:
                host.optimizer.step()
        finally:
            self._frees = False

    def before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Update every parameter that has a gradient, in the optimizer's order."""
        if (args[1:] and args[1] is not None) or kwargs.get("closure") is not None:
            raise UnsupportedError(
                "optimizer.step(closure) computes gradients within the step, and the optimizer's state is outside "
                "the device: call backward first, then optimizer.step()"
            )
        due = [p for p in self._host.parameters() if p.grad is not None]
        if not due:
            return
        self._streamed.expect(due)
        try:
            for parameter in due:
                self._host.update(parameter)
                if not self._frees and parameter.grad is not None:
                    self._kept.append((parameter, parameter.grad))
                parameter.grad = None
            self._streamed.ahead.release()
        except BaseException:
            self.after()
            raise
        finally:
            self._streamed.expect(None)

    def after(self, *_: object) -> None:
        """In the user's own loop gradients stay until the user frees them."""
        for parameter, gradient in self._kept:
            parameter.grad = gradient
        self._kept.clear()


def _take_over(host: Host, optimizer: Optimizer, streamed: StreamedUpdate) -> Undo:
    """Hang the streamed update into the host and the optimizer's own hooks."""
    step = _OwnStep(host, streamed)

    def complete(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        indices: dict[int, int] = {}
        for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
            indices.update(
                (id(p), i) for p, i in zip(group["params"], packed["params"], strict=True)
            )
        for parameter in streamed.state.parameters():
            state_dict["state"][indices[id(parameter)]] = streamed.full_state(parameter)

    def moved(_: Optimizer) -> None:
        streamed.reload()

    hooks = [
        optimizer.register_step_pre_hook(step.before),  # pyright: ignore[reportArgumentType]
        optimizer.register_step_post_hook(step.after),
        optimizer.register_state_dict_post_hook(complete, prepend=True),
        optimizer.register_load_state_dict_post_hook(moved),
    ]
    undo = Undo(streamed.bring_back, *(hook.remove for hook in hooks))
    update, finish = host.update, host.finish
    undo.then(lambda: setattr(host, "update", update))
    host.update = streamed.update
    # a finish that was taken over already ends in optimizer.step(), which streams what is still owed
    if finish == host._step_in_memory:
        undo.then(lambda: setattr(host, "finish", finish))
        host.finish = step.finish
    return undo
