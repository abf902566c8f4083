"""From a profile to the records that methods are offered: one for each block and one for the whole step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np

from slimgrad.measuring.optimizer import OptimizerLaw
from slimgrad.measuring.profile import Profile
from slimgrad.measuring.trace import Trace
from slimgrad.method import CodingCost, ModelRecord, Record, Setting, Update
from slimgrad.planning.calls import BlockLayout, border_bytes, call_bytes
from slimgrad.planning.compiled_calls import is_measured
from slimgrad.planning.compiling import DEFAULT_STEPS
from slimgrad.planning.simulate import Layout


def plain_record(law: OptimizerLaw) -> ModelRecord:
    """The record of a step in which nothing is changed."""
    return ModelRecord(
        weight_bytes=0,
        gradient_bytes=sum(p.nbytes for p in law.parameters),
        state_bytes=law.state_bytes,
        state_tensors=law.state_tensors,
        largest_parameter_bytes=max((p.nbytes for p in law.parameters), default=0),
        update_s=law.seconds_per_element * sum(int(np.prod(p.shape)) for p in law.parameters),
        batch_size=0,
        separable=law.separable,
        elementwise=law.elementwise,
    )


def model_record(
    profile: Profile,
    num_parts: int,
    clip_grad_norm: float | None,
    num_steps: int = DEFAULT_STEPS,
) -> ModelRecord:
    """The record of a whole step of ``profile``, run in ``num_parts`` micro-batches."""
    return replace(
        plain_record(profile.law),
        weight_bytes=profile.weight_bytes,
        batch_size=profile.batch_size,
        has_batch_statistics=profile.has_batch_statistics,
        has_dropout=profile.has_dropout,
        clip_grad_norm=clip_grad_norm,
        read_bytes_s=profile.read_bytes_s,
        write_bytes_s=profile.write_bytes_s,
        micro_batches=num_parts,
        gradient_bytes=profile.trainable_bytes
        if profile.law.state_tensors or profile.law.separable
        else 0,
        compile_s=profile.compile_s,
        num_steps=num_steps,
    )


def gradients_stay(model: ModelRecord) -> bool:
    """Whether gradients stay until backward is over: no update or file takes them before."""
    return not model.gradients_in_files and model.update is Update.AFTER


def block_record(
    profile: Profile,
    layout: Layout,
    block: BlockLayout,
    *,
    model: ModelRecord,
    num_steps: int = DEFAULT_STEPS,
) -> Record:
    """The record of a block as it was measured, in a step that is run as ``model`` says."""
    trace = layout.trace
    saved = sum(call_bytes(trace, s) for s in block.saved.values())
    cost = profile.compiled.get(block.path) if len(block.paths) == 1 else None
    borders = [
        (border_bytes(trace, trace.calls[g[0]])[0], border_bytes(trace, trace.calls[g[-1]])[1])
        for g in block.groups
    ]
    return Record(
        saved_bytes=saved,
        held_bytes=saved,
        input_bytes=sum(b[0] for b in borders),
        output_bytes=sum(b[1] for b in borders),
        forward_s=layout.seconds(block.calls, backward=False),
        backward_s=layout.seconds(block.calls, backward=True),
        saved_sizes=tuple(int(trace.nbytes[i]) for s in block.saved.values() for i in s),
        has_batch_statistics=profile.has_batch_statistics,
        read_bytes_s=profile.read_bytes_s,
        write_bytes_s=profile.write_bytes_s,
        graph=layout.graph(block.where),
        held_anyway=layout.held_anyway(block.where),
        are_repeatable=layout.are_repeatable(block.where),
        compiled=cost if cost is not None and is_measured(layout, block.path, cost) else None,
        num_steps=num_steps,
        coding=_coding(profile, layout, block),
        gradients_stay=gradients_stay(model),
    )


_plain_layouts: WeakKeyDictionary[Profile, Layout] = WeakKeyDictionary()


def _coding(profile: Profile, layout: Layout, block: BlockLayout) -> Mapping[Setting, CodingCost]:
    """What codes cost on a block: nothing is known of one whose operations are not those that it was measured with."""
    costs = profile.coding.get(block.path, {})
    if len(block.paths) > 1 or not costs:
        return {}
    plain = profile.variants[()]
    if layout.trace is plain:
        return costs
    if profile not in _plain_layouts:
        _plain_layouts[profile] = layout_of(profile, plain)
    measured, graph = _plain_layouts[profile].graph(block.where), layout.graph(block.where)
    alike = measured is not None and graph is not None and graph.does_the_same_as(measured)
    return costs if alike else {}


def layout_of(profile: Profile, trace: Trace) -> Layout:
    """The trace laid out for replays, with the profile's optimizer."""
    writes_behind = profile.device.startswith("cuda")  # on the CPU each block waits for its own
    return Layout(trace, profile.law, profile.law.state_bytes, writes_behind=writes_behind)
