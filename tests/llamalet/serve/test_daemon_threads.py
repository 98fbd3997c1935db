"""Threads for slow work: what waits is bounded, what nobody wants is left out, and the process may end meanwhile."""

import asyncio
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from llamalet.serve.api_error import ApiError
from llamalet.serve.daemon_threads import DaemonThreads
from llamalet.serve.exchange import Bodies, Exchange
from llamalet.serve.worker import ClientGone


def test_results_and_errors_come_back():
    async def test():
        threads = DaemonThreads("test", 2, 4)
        assert await asyncio.gather(*(threads.call(divmod, 7, number) for number in (2, 3))) == [(3, 1), (2, 1)]
        with pytest.raises(ZeroDivisionError):
            await threads.call(divmod, 7, 0)

    asyncio.run(test())


def test_threads_work_side_by_side():
    async def test():
        threads, barrier = DaemonThreads("test", 2, 4), threading.Barrier(2)
        await asyncio.wait_for(asyncio.gather(threads.call(barrier.wait, 5), threads.call(barrier.wait, 5)), 9)

    asyncio.run(test())


def test_what_waits_is_bounded_and_what_nobody_wants_is_not_done():
    async def test():
        threads, gate, done = DaemonThreads("test", 1, 3), threading.Event(), []
        calls = [asyncio.create_task(threads.call(gate.wait, 9))]
        calls += [asyncio.create_task(threads.call(done.append, number)) for number in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(ApiError, match="3 requests wait") as caught:
            await threads.call(done.append, 2)
        assert caught.value.status == 503 and caught.value.headers["retry-after"] == "1"
        calls[1].cancel()
        await asyncio.sleep(0.01)
        calls[1] = asyncio.create_task(threads.call(done.append, 3))  # there is room again
        await asyncio.sleep(0.01)
        gate.set()
        await asyncio.gather(*calls)
        assert done == [1, 3]

    asyncio.run(test())


def test_a_client_that_goes_does_not_wait():
    async def test():
        gone, gate, done = asyncio.Event(), threading.Event(), []

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        bodies = Bodies(max_bytes=1, max_total_bytes=1, seconds=1)
        exchange = Exchange({"headers": []}, receive, SimpleNamespace(), bodies)
        threads = DaemonThreads("test", 1, 3)
        first = asyncio.create_task(threads.call(gate.wait, 9))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(exchange.unless_gone(threads.call(done.append, 1)))
        await asyncio.sleep(0.01)
        gone.set()
        with pytest.raises(ClientGone):
            await asyncio.wait_for(second, 1)
        gate.set()
        assert await first
        assert await threads.call(done.copy) == []
        gone.clear()
        assert await exchange.unless_gone(threads.call(divmod, 7, 2)) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await exchange.unless_gone(threads.call(divmod, 7, 0))

    asyncio.run(test())


def test_the_process_ends_while_a_thread_works():
    code = """
import asyncio, time
from llamalet.serve.daemon_threads import DaemonThreads
async def main():
    asyncio.create_task(DaemonThreads("test", 1, 1).call(time.sleep, 60))
    await asyncio.sleep(0.05)
asyncio.run(main())
"""
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert time.monotonic() - start < 20
