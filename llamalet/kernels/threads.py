"""Threads that share the work of one compiled call.

A job is a row of stages, a stage is a number of blocks that may run at once, and one atomic word, the ticket, says
which block of which stage is next:

    sequence of the job (31 bits) | stage (16 bits) | block (16 bits)

A thread takes a block by adding one to the ticket. Whoever completes the last block of a stage opens the next one, or
does it at once if it has one block only. Nobody waits for a thread that has not come: the caller alone could do the
whole job, helpers only take blocks from it. So a busy machine, a missing thread or a slow core costs what it must and
no more, where a pool with barriers waits for its slowest member at every one of them. A helper that comes late finds no
block of an old job, because a ticket is never the same twice.

The compiled side (`take`, `complete`, ...) is used by ops.py, the Python side (`Team`) by transformer.py.
"""

import os
import platform
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from llamalet.cores import physical_cores
from llamalet.errors import ConfigError

# Words of the array that the threads share, each in a cache line of its own.
TICKET, DONE, BINDING, SHARED_WORDS = 0, 16, 32, 48

# More would need more blocks than a ticket can count.
MAX_THREADS = 1024

BLOCK_BITS, STAGE_BITS, SEQUENCE_BITS = 16, 16, 31
BLOCK_MASK, STAGE_MASK, SEQUENCE_MASK = (1 << BLOCK_BITS) - 1, (1 << STAGE_BITS) - 1, (1 << SEQUENCE_BITS) - 1

# A thread that finds no work looks again this often at once, after that it lets others run between its looks; when the
# job is done, a helper goes to sleep after so many looks, about a millisecond on an idle machine.
SPINS, LOOKS = 2000, 4000

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
WORD_BYTES = 8


@intrinsic
def atomic_load(typing_context: Any, words: Any, index: Any) -> Any:
    """Return words[index] of an int64 array, with everything that was written before it was stored."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_address(context, builder, signature, args), "acquire", WORD_BYTES)

    return types.int64(words, types.intp), build


@intrinsic
def atomic_store(typing_context: Any, words: Any, index: Any, value: Any) -> Any:
    """Set words[index] of an int64 array; who loads it sees everything written before."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _address(context, builder, signature, args), "release", WORD_BYTES)
        return context.get_dummy_value()

    return types.none(words, types.intp, types.int64), build


@intrinsic
def atomic_add(typing_context: Any, words: Any, index: Any, value: Any) -> Any:
    """Add to words[index] of an int64 array and return what it was."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _address(context, builder, signature, args), args[2], "acq_rel")

    return types.int64(words, types.intp, types.int64), build


@intrinsic
def atomic_replace(typing_context: Any, words: Any, index: Any, expected: Any, value: Any) -> Any:
    """Set words[index] of an int64 array if it is as expected; return whether it was."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature, args)
        return builder.extract_value(builder.cmpxchg(address, args[2], args[3], "acq_rel", "monotonic"), 1)

    return types.boolean(words, types.intp, types.int64, types.int64), build


@intrinsic
def pause(typing_context: Any) -> Any:
    """Tell the processor that this is a loop that waits."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType(), ())
        return context.get_dummy_value()

    return types.none(), build


@intrinsic
def let_others_run(typing_context: Any) -> Any:
    """Give the processor to another thread that wants it, if there is one."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _call(builder, "SwitchToThread" if os.name == "nt" else "sched_yield", I32, ())
        return context.get_dummy_value()

    return types.none(), build


def _address(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
    """Return the address of args[0][args[1]]."""
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(array.data, [args[1]])


def _call(builder: ir.IRBuilder, name: str, result: Any, args: Any) -> Any:
    """Call an external function by its name."""
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


compiled = njit(nogil=True, _nrt=False)


@compiled
def open_job(shared: Any) -> None:
    """Let the blocks of stage 0 of a new job be taken."""
    sequence = ((atomic_load(shared, TICKET) >> (STAGE_BITS + BLOCK_BITS)) + 1) & SEQUENCE_MASK
    atomic_store(shared, TICKET, sequence << (STAGE_BITS + BLOCK_BITS))


@compiled
def open_stage(shared: Any, stage: int) -> None:
    """Let the blocks of a later stage be taken; called by the thread that completed the last block before it."""
    sequence = atomic_load(shared, TICKET) >> (STAGE_BITS + BLOCK_BITS)
    atomic_store(shared, TICKET, ((sequence << STAGE_BITS) + stage) << BLOCK_BITS)


@compiled
def stage_of(ticket: int) -> int:
    """Return the number of the stage that a ticket belongs to."""
    return (ticket >> BLOCK_BITS) & STAGE_MASK


@compiled
def block_of(ticket: int) -> int:
    """Return the number of the block that is next."""
    return ticket & BLOCK_MASK


@compiled
def take(shared: Any, ticket: int) -> bool:
    """Return whether the block that is next on this ticket is now the caller's."""
    return atomic_replace(shared, TICKET, ticket, ticket + 1)


@compiled
def complete(shared: Any, n_blocks: int) -> bool:
    """Report a finished block; return whether it was the last of its stage's `n_blocks`."""
    if atomic_add(shared, DONE, 1) < n_blocks - 1:
        return False
    atomic_store(shared, DONE, 0)
    return True


@compiled
def wait(looks: int) -> None:
    """Pass a moment before looking for work again, for the `looks`-th time."""
    if looks < SPINS:
        pause()
    else:
        let_others_run()


def new_words() -> NDArray[np.int64]:
    """Return the words that the threads share: no job, nothing done, binding 0."""
    return np.zeros(SHARED_WORDS, np.int64)


class Team:
    """A compiled function that runs on several threads, the caller's and sleeping helpers.

    Args:
        work: compiled without the GIL; takes the arguments of a job, the shared words, the number of the binding and
            that of the thread, 0 for the caller's. It returns when the binding is no longer the current one; a helper
            also when it has found no work for a while.
        n_threads: the caller's thread included.
    """

    def __init__(self, work: Callable[..., None], n_threads: int) -> None:
        self._work = work
        self._shared = new_words()
        self._arguments: tuple[Any, ...] = ()
        self._alarms = [threading.Event() for _ in range(n_threads - 1)]
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None

    def run(self, arguments: tuple[Any, ...]) -> None:
        """Do one job; the caller sees to it that there is only one at a time.

        The helpers keep the arguments, so the same tuple should be passed as long as they are the same.
        """
        if self._failure is not None:
            raise self._failure
        if arguments is not self._arguments:
            self._arguments = arguments
            self._shared[BINDING] += 1
        for alarm in self._alarms:
            if not alarm.is_set():
                alarm.set()
        self._work(*arguments, self._shared, int(self._shared[BINDING]), 0)
        if self._failure is not None:
            raise self._failure
        # After the first job: a function that is compiled when it is called must not be called by all at once.
        if not self._threads:
            self._start()

    def stop(self) -> None:
        """Let the helpers end."""
        self._work = _nothing
        self._shared[BINDING] += 1
        for alarm in self._alarms:
            alarm.set()

    def _start(self) -> None:
        """Start the helpers."""
        for member, alarm in enumerate(self._alarms, start=1):
            thread = threading.Thread(target=self._help, args=(member, alarm), name="llamalet", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _help(self, member: int, alarm: threading.Event) -> None:
        """Help with jobs; sleep while there are none."""
        while self._work is not _nothing:
            # Before looking for work: a job that comes while this thread turns away from its last look must wake it.
            alarm.clear()
            binding = int(self._shared[BINDING])
            try:
                self._work(*self._arguments, self._shared, binding, member)
            except BaseException as error:  # its block stays open: a new binding tells the caller not to wait for it
                self._failure = error
                self._shared[BINDING] += 1
                return
            if binding == self._shared[BINDING]:
                alarm.wait()


def _nothing(*arguments: Any) -> None:
    """Take the place of the work when it is over."""


def thread_count(threads: int | None = None) -> int:
    """Return how many threads compute.

    Args:
        threads: what was asked for; None takes NUMBA_NUM_THREADS or OMP_NUM_THREADS where set, else one thread for each
            physical core that this process may use.

    Raises:
        ConfigError: if a number is not positive.
    """
    if threads is not None:
        if not 1 <= threads <= MAX_THREADS:
            raise ConfigError(f"threads={threads}: must be at least 1 and at most {MAX_THREADS}")
        return threads
    for variable in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        # OMP_NUM_THREADS may be a list, one number for each level of nesting.
        value = os.environ.get(variable, "").partition(",")[0].strip()
        if value:
            if not (value.isascii() and value.isdigit() and 1 <= int(value) <= MAX_THREADS):
                raise ConfigError(f"{variable}={value}: must be a positive number, at most {MAX_THREADS}")
            return int(value)
    return physical_cores()
