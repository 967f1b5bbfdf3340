"""Two phases in one launch: programs of the second wait for what those of the first have written.

Programs take tickets, so that whoever waits has a higher number than whoever it waits for, which therefore runs
already: nothing is assumed about the order in which a GPU starts programs, nor that all of them fit on it at a time.
What is added up is added in a fixed order. The last program to leave puts everything back to zero for the next launch
of the stream.

``sync`` is int32, zeros: tickets, programs that have left, and then a counter for each thing that is waited for.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def take_ticket(sync):
    """The number of this program."""
    return tl.atomic_add(sync, 1, sem="relaxed")


@triton.jit
def arrive(sync, counter):
    """What this program wrote is there for whoever waits for ``counter``."""
    tl.debug_barrier()  # all threads have written
    tl.atomic_add(sync + 2 + counter, 1, sem="release")


@triton.jit
def wait(sync, counter, count):
    """Until ``count`` programs have arrived at ``counter``."""
    while tl.atomic_add(sync + 2 + counter, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def is_last(sync, programs):
    """Whether this is the last of ``programs`` that asks, once each: what all others wrote before is then there."""
    tl.debug_barrier()
    last = tl.atomic_add(sync + 1, 1, sem="acq_rel") == programs - 1
    tl.debug_barrier()
    return last


@triton.jit
def reset(sync, counters, BLOCK: tl.constexpr = 128):
    """Put everything back to zero: what the last program does at its end."""
    for begin in range(0, counters + 2, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        tl.store(sync + at, tl.zeros([BLOCK], tl.int32), mask=at < counters + 2)


@triton.jit
def leave(sync, counters, programs):
    """Called by each of ``programs`` at its end; nothing is read or written after it."""
    if is_last(sync, programs):
        reset(sync, counters)
