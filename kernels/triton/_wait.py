"""How the programs of a cooperative launch wait for each other between steps.

    stores of a step | arrive: barrier, add, release | wait_for: read, acquire, barrier | loads of the next

What any thread stored before its program arrived, every thread that waited for it reads. The barrier orders all
threads of a program before the one that counts; that one releases, at the scope of the GPU, what it has seen. The
thread that waits acquires it, which also discards what the L1 cache of its multiprocessor holds, and the next barrier
orders the other threads after it. Loads need no modifier; they must not be asserted to be of constant memory, and
neither Triton nor LLVM moves them across atomic operations. Triton's loads cannot acquire, so waiting adds 0.

On AMD GPUs no program waits: in Triton 3.7's code for gfx942, the barrier does not wait for the stores of the threads
that it orders, so that the one that counts may release before they are done.

Counters are those of `fastmimi.runtime.arrivals`: zero before a launch, and set back by the last program to leave.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arrive(p_arrivals):
    """This program has ended a step that others wait for."""
    tl.debug_barrier()  # all threads have stored
    tl.atomic_add(p_arrivals, 1, sem="release")


@triton.jit
def wait_for(p_arrivals, count):
    """Wait until there are `count` arrivals."""
    while tl.atomic_add(p_arrivals, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()  # no thread loads before the one that waited


@triton.jit
def leave(p_arrivals, count):
    """This program waits no more; the last of `count` to arrive or leave sets the counter back to zero."""
    if tl.atomic_add(p_arrivals, 1, sem="relaxed") == count - 1:
        tl.store(p_arrivals, 0)
