"""Threads that share the work of one compiled call.

A job is a sequence of stages, a stage is a number of blocks that may run at the same time. One atomic word, the ticket,
says which block of which stage is next:

    number of the job (31 bits) | stage (16 bits) | block (16 bits)

A thread takes a block by adding one to the ticket. The thread that completes the last block of a stage opens the next
stage, or runs it at once if it has one block only. There are no barriers: the caller could do the whole job alone and
helpers only take blocks from it, so a slow thread delays nothing but the blocks it has taken. A helper that comes late
finds no block of an old job, because no ticket occurs twice.

stages.py and the ops of llamalet/backward call the compiled functions (`open_job`, `next_block`, `blocks`),
transformer.py and backward/runner.py the class `ThreadTeam`.
"""

import os
import platform
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from llamalet.kernels import llvm, processor
from llamalet.kernels.jit import inner_kernel
from llamalet.kernels.shared import shared_kernel

# Indices into the array that the threads share, each word in a cache line of its own: the ticket, the finished blocks
# of the stage, the number of the arguments that are in use.
TICKET, DONE, GENERATION, SHARED_WORDS = 0, 16, 32, 48

BLOCK_BITS, STAGE_BITS, JOB_BITS = 16, 16, 31
BLOCK_MASK, STAGE_MASK, JOB_MASK = (1 << BLOCK_BITS) - 1, (1 << STAGE_BITS) - 1, (1 << JOB_BITS) - 1

# A thread that finds no block polls the ticket this often, then lets other threads run between polls. After the job a
# helper goes to sleep once it has polled IDLE_POLLS times, some milliseconds on an idle machine: less would cost each
# pass over a draft's tokens a thread's waking up.
SPINS, IDLE_POLLS = 2000, 20000

STOP_S = 1.0
"""How long the end of a team waits for each helper, which needs some microseconds."""

WORD_BYTES = 8

WHOLE_SYSTEM = 15  # the only operand of isb


@intrinsic
def atomic_load(typing_context: Any, words: Any, index: Any) -> Any:
    """Return words[index] of an int64 array; what its writer wrote before is visible afterwards."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_address(context, builder, signature, args), "acquire", WORD_BYTES)

    return types.int64(words, types.intp), build


@intrinsic
def atomic_store(typing_context: Any, words: Any, index: Any, value: Any) -> Any:
    """Set words[index] of an int64 array; a thread that loads it sees everything written before."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _address(context, builder, signature, args), "release", WORD_BYTES)
        return context.get_dummy_value()

    return types.none(words, types.intp, types.int64), build


@intrinsic
def atomic_add(typing_context: Any, words: Any, index: Any, value: Any) -> Any:
    """Add to words[index] of an int64 array and return its earlier value."""

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
        if processor.is_arm():  # isb waits for what is under way; Arm's yield would wait for nothing
            llvm.call(builder, "llvm.aarch64.isb", ir.VoidType(), (ir.Constant(llvm.I32, WHOLE_SYSTEM),))
        elif platform.machine() in ("x86_64", "AMD64"):
            llvm.call(builder, "llvm.x86.sse2.pause", ir.VoidType(), ())
        return context.get_dummy_value()

    return types.none(), build


@intrinsic
def let_others_run(typing_context: Any) -> Any:
    """Give the processor to another thread that wants it, if there is one."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        llvm.call(builder, "SwitchToThread" if os.name == "nt" else "sched_yield", llvm.I32, ())
        return context.get_dummy_value()

    return types.none(), build


def _address(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
    """Return the address of args[0][args[1]]."""
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(array.data, [args[1]])


@inner_kernel
def open_job(shared: Any) -> None:
    """Open stage 0 of a new job."""
    job = ((atomic_load(shared, TICKET) >> (STAGE_BITS + BLOCK_BITS)) + 1) & JOB_MASK
    atomic_store(shared, TICKET, job << (STAGE_BITS + BLOCK_BITS))


@inner_kernel
def next_block(shared: Any, n_blocks: Any, generation: int, thread: int, done: int) -> Any:
    """Report a finished block and take another one.

    Args:
        shared: the team's words.
        n_blocks: int64 (stages + 1,), the blocks of each stage; the last element is 0 and marks the end of the job.
        generation: the number of the arguments that the calling function got; it must return when they are replaced.
        thread: the thread's number, 0 for the caller's.
        done: the stage of the block that the thread has just finished; -1 if it comes without one.

    Returns:
        The stage and the block to run next; stage -1 when the calling function must return: the job is done, and for
        a helper, no other has come for a while.
    """
    if done >= 0 and atomic_add(shared, DONE, 1) == n_blocks[done] - 1:  # the stage's last block
        atomic_store(shared, DONE, 0)
        stage = done + 1
        if n_blocks[stage] == 1:
            return stage, 0
        job = atomic_load(shared, TICKET) >> (STAGE_BITS + BLOCK_BITS)
        atomic_store(shared, TICKET, ((job << STAGE_BITS) + stage) << BLOCK_BITS)
    end, idle_polls = len(n_blocks) - 1, 0
    while True:
        ticket = atomic_load(shared, TICKET)
        stage, block = (ticket >> BLOCK_BITS) & STAGE_MASK, ticket & BLOCK_MASK
        if atomic_load(shared, GENERATION) != generation:
            return -1, 0
        if stage == end and (thread == 0 or idle_polls >= IDLE_POLLS):
            return -1, 0
        if block >= n_blocks[stage]:
            if idle_polls < SPINS:
                pause()
            else:
                let_others_run()
            idle_polls += 1
        elif atomic_replace(shared, TICKET, ticket, ticket + 1):
            return stage, block


class Team(NamedTuple):
    """What a compiled function needs to share its blocks with other threads; see `next_block`.

    thread: the thread's number, 0 for the caller's.
    """

    shared: Any
    n_blocks: Any
    generation: int
    thread: int


@inner_kernel
def blocks(team: Any) -> Any:
    """Yield the blocks of a job of one stage that fall to this thread; thread 0 opens the job."""
    block = block_of_job(team, True)
    while block >= 0:
        yield block
        block = block_of_job(team, False)


@shared_kernel
def block_of_job(team: Any, first: bool) -> int:
    """Return the next block of a job of one stage, or -1."""
    if first and team.thread == 0:
        open_job(team.shared)
    stage, block = next_block(team.shared, team.n_blocks, team.generation, team.thread, -1 if first else 0)
    return block if stage >= 0 else -1


def new_words() -> NDArray[np.int64]:
    """Return the words that the threads share: no job, nothing done, generation 0."""
    return np.zeros(SHARED_WORDS, np.int64)


class ThreadTeam:
    """A compiled function that runs on several threads: the caller's and sleeping helpers.

    Args:
        work: compiled without the GIL. It takes the arguments of a job, the shared words, the generation of the
            arguments and the number of the thread, 0 for the caller's. It returns when the generation has changed or
            the job is done; a helper first waits a while for another job.
        n_threads: number of threads, the caller's included.
    """

    def __init__(self, work: Callable[..., None], n_threads: int) -> None:
        self._work = work
        self._n_threads = n_threads
        self.begin()

    def begin(self) -> None:
        """Begin without helpers and jobs, as a forked process must: it has none of its parent's threads."""
        self._shared = new_words()
        self._arguments: tuple[Any, ...] = ()
        self._alarms = [threading.Event() for _ in range(self._n_threads - 1)]
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None

    def run(self, arguments: tuple[Any, ...]) -> None:
        """Do one job. The caller makes sure that no other is running.

        The helpers keep the arguments, so pass the same tuple for as long as they are the same.
        """
        if self._failure is not None:
            raise self._failure
        if arguments is not self._arguments:
            self._arguments = arguments
            self._shared[GENERATION] += 1
        for alarm in self._alarms:
            if not alarm.is_set():
                alarm.set()
        self._work(*arguments, self._shared, int(self._shared[GENERATION]), 0)
        if self._failure is not None:
            raise self._failure
        # After the first job, because a function that compiles at its first call must not be called by all at once.
        if not self._threads:
            for number, alarm in enumerate(self._alarms, start=1):
                thread = threading.Thread(target=self._help, args=(number, alarm), name="llamalet", daemon=True)
                self._threads.append(thread)
                thread.start()

    def stop(self) -> None:
        """Let the helpers end, and wait for them: Python must not end while they leave compiled code."""
        self._work = _nothing
        self._shared[GENERATION] += 1
        for alarm in self._alarms:
            alarm.set()
        for thread in self._threads:
            if thread is not threading.current_thread():  # a helper may be who collects what the team belonged to
                thread.join(STOP_S)

    def _help(self, number: int, alarm: threading.Event) -> None:
        """Help with jobs; sleep while there are none."""
        while self._work is not _nothing:
            # Before looking for work: a job that arrives after this thread's last poll must wake it.
            alarm.clear()
            generation = int(self._shared[GENERATION])
            try:
                self._work(*self._arguments, self._shared, generation, number)
            except BaseException as error:  # its block stays open; the new generation tells the caller not to wait
                self._failure = error
                self._shared[GENERATION] += 1
                return
            if generation == self._shared[GENERATION]:
                alarm.wait()


def _nothing(*arguments: Any) -> None:
    """Replace the work of a stopped team."""
