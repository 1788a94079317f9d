"""The Triton kernels of :mod:`spiking_rl.gpu`: a program scans a tile of places times channels of one sample."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(channels, places, channel_stride, place_stride, TILE_P: tl.constexpr, TILE_C: tl.constexpr):
    """Return this program's sample, its channels, which of its neurons there are, and where they lie in a timestep."""
    strips = tl.cdiv(places, TILE_P)
    sample = tl.program_id(0) // strips
    p = (tl.program_id(0) % strips) * TILE_P + tl.arange(0, TILE_P)[:, None]
    c = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)[None, :]
    at = sample.to(tl.int64) * channels * places + c * channel_stride + p * place_stride
    return sample, c, (p < places) & (c < channels), at


@triton.jit
def _kept(keep, t, batch, sample, KEEP: tl.constexpr):
    """Return 0 where an episode starts at a timestep, else 1."""
    kept = 1.0
    if KEEP:
        kept = tl.load(keep + t * batch + sample)
    return kept


@triton.jit
def forward(
    current,
    before,
    keep,
    leak,
    threshold,
    spikes,
    potentials,
    after,
    steps,
    repeat,
    batch,
    channels,
    places,
    channel_stride,
    place_stride,
    LEAKS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    BEFORE: tl.constexpr,
    KEEP: tl.constexpr,
    TRACE: tl.constexpr,
    CARRY: tl.constexpr,
    ONCE: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Scan forwards; pointers may be None where their capital flag says that they are not there."""
    sample, c, inside, at = _tile(channels, places, channel_stride, place_stride, TILE_P, TILE_C)
    every = tl.cast(batch, tl.int64) * channels * places  # a batch of 1 is a constant, which has no .to
    own_leak = tl.load(leak + c * LEAKS, mask=c < channels, other=1.0)
    limit = tl.load(threshold + c * THRESHOLDS, mask=c < channels, other=1.0)
    membrane = tl.zeros((TILE_P, TILE_C), tl.float32)
    if BEFORE:
        membrane = tl.load(before + at, mask=inside, other=0.0)
    spent = tl.zeros((TILE_P, TILE_C), tl.float32)
    for t in range(steps):
        now = tl.load(current + t // repeat * every + at, mask=inside, other=0.0).to(tl.float32)
        u = own_leak * _kept(keep, t, batch, sample, KEEP) * membrane + now
        fired = tl.where(u > limit, 1.0, 0.0)
        if ONCE:
            fired = fired * (1.0 - spent)
            spent = spent + fired
        membrane = u - fired * limit
        tl.store(spikes + t * every + at, fired.to(spikes.dtype.element_ty), mask=inside)
        if TRACE:
            tl.store(potentials + t * every + at, u, mask=inside)
    if CARRY:
        tl.store(after + at, membrane, mask=inside)


@triton.jit
def backward(
    current,
    before,
    keep,
    leak,
    threshold,
    gamma,
    by_spikes,
    by_potentials,
    by_after,
    scratch,
    of_current,
    of_before,
    of_leak,
    of_threshold,
    steps,
    repeat,
    batch,
    channels,
    places,
    channel_stride,
    place_stride,
    TINY: tl.constexpr,
    LEAKS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    BEFORE: tl.constexpr,
    KEEP: tl.constexpr,
    BY_SPIKES: tl.constexpr,
    BY_TRACE: tl.constexpr,
    BY_AFTER: tl.constexpr,
    ONCE: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Scan backwards; ``of_leak`` and ``of_threshold`` get a row of channels per program, to be summed up."""
    sample, c, inside, at = _tile(channels, places, channel_stride, place_stride, TILE_P, TILE_C)
    every = tl.cast(batch, tl.int64) * channels * places  # a batch of 1 is a constant, which has no .to
    own_leak = tl.load(leak + c * LEAKS, mask=c < channels, other=1.0)
    limit = tl.load(threshold + c * THRESHOLDS, mask=c < channels, other=1.0)
    start = tl.zeros((TILE_P, TILE_C), tl.float32)
    if BEFORE:
        start = tl.load(before + at, mask=inside, other=0.0)
    # The potentials again: to have kept them would have cost their memory from the forward pass on.
    membrane = start
    when = tl.zeros((TILE_P, TILE_C), tl.int32) + steps  # at which a neuron fires, of those that fire once
    for t in range(steps):
        now = tl.load(current + t // repeat * every + at, mask=inside, other=0.0).to(tl.float32)
        u = own_leak * _kept(keep, t, batch, sample, KEEP) * membrane + now
        fired = u > limit
        if ONCE:
            when = tl.where(fired & (when == steps), t, when)
            fired = when == t
        membrane = u - tl.where(fired, limit, 0.0)
        tl.store(scratch + t * every + at, u, mask=inside)
    tl.debug_barrier()  # other threads of this program may read what these wrote
    carried = tl.zeros((TILE_P, TILE_C), tl.float32)
    if BY_AFTER:
        carried = tl.load(by_after + at, mask=inside, other=0.0)
    shared = tl.zeros((TILE_P, TILE_C), tl.float32)
    sum_leak = tl.zeros((TILE_P, TILE_C), tl.float32)
    sum_threshold = tl.zeros((TILE_P, TILE_C), tl.float32)
    for i in range(steps):
        t = steps - 1 - i
        u = tl.load(scratch + t * every + at, mask=inside, other=0.0)
        fired = u > limit
        if ONCE:
            fired = when == t
        arriving = tl.zeros((TILE_P, TILE_C), tl.float32)
        if BY_SPIKES:
            arriving = tl.load(by_spikes + t * every + at, mask=inside, other=0.0).to(tl.float32)
            if ONCE:
                arriving = tl.where(when < t, 0.0, arriving)
        if BY_TRACE:
            traced = tl.load(by_potentials + t * every + at, mask=inside, other=0.0)
            sum_threshold += tl.where(fired, traced, 0.0)
            carried += traced
        relative = u / limit
        through = arriving * tl.maximum(1.0 - tl.abs(relative - 1.0), 0.0) * gamma / limit
        sum_threshold -= through * relative + tl.where(fired, carried, 0.0)
        carried += through
        carried = tl.where(tl.abs(carried) < TINY, 0.0, carried)  # what is no number stays none
        shared += carried
        if t % repeat == 0:
            tl.store(of_current + t // repeat * every + at, shared.to(of_current.dtype.element_ty), mask=inside)
            shared = tl.zeros((TILE_P, TILE_C), tl.float32)
        carried = carried * _kept(keep, t, batch, sample, KEEP)
        earlier = start
        if t > 0:
            earlier = tl.load(scratch + (t - 1) * every + at, mask=inside, other=0.0)
            if ONCE:
                earlier -= tl.where(when == t - 1, limit, 0.0)
            else:
                earlier -= tl.where(earlier > limit, limit, 0.0)
        sum_leak += carried * earlier
        carried = carried * own_leak
    if BEFORE:
        tl.store(of_before + at, carried, mask=inside)
    row = tl.program_id(0).to(tl.int64) * channels + tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    column = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C) < channels
    tl.store(of_leak + row, tl.sum(tl.where(inside, sum_leak, 0.0), 0), mask=column)
    tl.store(of_threshold + row, tl.sum(tl.where(inside, sum_threshold, 0.0), 0), mask=column)
