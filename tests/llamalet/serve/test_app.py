"""What the routes share, without a server."""

import asyncio
import threading

import pytest

pytest.importorskip("starlette")

from llamalet.engine import Begun, Ended, NewToken
from llamalet.serve.app import LONG_PROMPT, App
from llamalet.serve.metrics import ServerMetrics


class ToyAnswer:
    """Notes what is pushed, and whether on the event loop's thread."""

    def __init__(self):
        self.events = []

    def push(self, number, event):
        self.events.append((number, type(event), threading.current_thread() is threading.main_thread()))


def test_the_logprobs_of_a_long_prompt_are_written_in_a_thread():
    answer = ToyAnswer()
    long, short = (Begun(0, 0, [None] * n, None) for n in (LONG_PROMPT + 1, LONG_PROMPT))
    token, end = NewToken(0, 5, "a", None), Ended(0, "", "length", None)
    events = [(0, long), (0, token), (1, short), (0, end), (1, Begun(1, 0, None, None))]
    asyncio.run(App(ServerMetrics()).take(None, events, answer))
    assert answer.events == [(number, type(event), event is not long) for number, event in events]
