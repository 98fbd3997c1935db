"""A chat template at work in a process of its own (template_child.py), which this module starts, asks and ends.

A template comes with a model, from whoever made it. It gets SECONDS to be read and SECONDS for each conversation, and
MEMORY_BYTES, where the system can limit memory (Linux; not macOS and Windows). The process is started, not forked, has
none of the environment's variables, and ends when this one does.
"""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llamalet.errors import UsageError

SECONDS, MEMORY_BYTES = 2.0, 512 << 20
# Python itself must start before the template's time begins, and a busy machine may take long for that.
START_SECONDS, GRACE_SECONDS = 30.0, 1.0
# What a Python needs to start, and the time zone, which strftime_now shows.
VARIABLES = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
BOOT = "import sys; sys.path += sys.argv[1:]; from llamalet.template_child import main; main()"
OLDEST_JINJA2 = (3, 1, 6)  # templates can break out of earlier ones
MAX_ERROR_BYTES, MAX_ERROR_CHARS = 1 << 14, 300


class TemplateProcess:
    """A chat template and the process that renders it, which is started again if it had to be stopped."""

    def __init__(self, source: str, special: Mapping[str, str], name: str) -> None:
        """Start the process, and let it read the template.

        Args:
            source: the template.
            special: the variables that hold the names of special tokens, like bos_token.
            name: where the template comes from, for error messages.

        Raises:
            UsageError: if it is not a template, or its process cannot be started.
        """
        self._name = name
        self._first = {"source": source, "special": dict(special), "seconds": SECONDS, "bytes": MEMORY_BYTES}
        self._paths = [str(Path(__file__).parents[1]), *_jinja2_paths(name)]
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: Callable[[], object] = lambda: None
        self._start()

    def render(self, messages: Sequence[Mapping[str, str]], max_chars: int) -> tuple[str, str]:
        """Return the text of a conversation, and for each character whether it is the template's (marked_text.py).

        Args:
            messages: role and content of each, and perhaps the marks of the content.
            max_chars: how long the text may become.

        Raises:
            UsageError: if the template refuses the conversation, or needs too much time, memory or text.
        """
        if self._process is None or self._process.poll() is not None:  # stopped, or the parent's, in a fork
            self._start()
        # A character takes at most 12 bytes in JSON, and its mark takes one.
        n_bytes = MAX_ERROR_BYTES + 13 * max_chars
        reply = self._ask({"messages": list(messages), "max_chars": max_chars}, SECONDS, n_bytes)
        if "error" in reply:
            raise UsageError(f"{self._name}: the chat template refuses the conversation: {_one_line(reply['error'])}")
        try:
            text, marks = reply["text"], reply["marks"]
            if not isinstance(text, str) or not isinstance(marks, str) or len(text) != len(marks):
                raise ValueError
        except (KeyError, ValueError):
            self._fail("its process gave a senseless answer")
        return text, marks

    def _start(self) -> None:
        """Start the process and give it the template."""
        if not sys.executable:
            raise UsageError(f"{self._name}: a chat template needs a Python to run in, and sys.executable names none")
        self._stop()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-c", BOOT, *self._paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in VARIABLES if name in os.environ},
                start_new_session=True,  # Ctrl-C is for this process alone
            )
        except OSError as error:
            raise UsageError(f"{self._name}: no process for the chat template: {error.strerror or error}") from None
        self._stop = weakref.finalize(self, _end, self._process)
        reply = self._ask(self._first, START_SECONDS, MAX_ERROR_BYTES)
        if "error" in reply:
            self._stop()
            raise UsageError(f"{self._name}: not a usable chat template: {_one_line(reply['error'])}")

    def _ask(self, request: Mapping[str, Any], seconds: float, n_bytes: int) -> dict[str, Any]:
        """Send a request and return the reply, of at most n_bytes.

        Raises:
            UsageError: if there is no reply in time, or no sensible one.
        """
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        begin = time.monotonic()
        alarm = threading.Timer(seconds + GRACE_SECONDS, process.kill)  # the process has one of its own, too
        alarm.daemon = True
        alarm.start()
        try:
            with contextlib.suppress(OSError):  # it has ended, and so does its output
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            line = process.stdout.readline(n_bytes)
        except BaseException:  # Ctrl-C: the reply would be taken for the next one's
            self._stop()
            raise
        finally:
            alarm.cancel()
        if not line.endswith(b"\n"):
            late = time.monotonic() - begin >= SECONDS
            limit = f"{SECONDS:g} s" if late else f"{MEMORY_BYTES >> 20} MB"
            self._fail(f"it takes more than {limit}" + ("" if late else ", or crashes Python"))
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            self._fail("its process gave a senseless answer")
        return reply

    def _fail(self, reason: str) -> NoReturn:
        """End the process and raise a UsageError."""
        self._stop()
        raise UsageError(f"{self._name}: the chat template cannot be used: {reason}")


def _jinja2_paths(name: str) -> list[str]:
    """Return the folders of jinja2 and of what it needs, which an isolated process would not find.

    Raises:
        UsageError: if jinja2 is not installed, or too old to hold a template back.
    """
    from importlib import metadata

    found = [importlib.util.find_spec(package) for package in ("jinja2", "markupsafe")]
    paths = [str(Path(spec.origin).parents[1]) for spec in found if spec is not None and spec.origin is not None]
    if len(paths) < len(found):
        raise UsageError(f"{name}: a chat template needs the jinja2 package: pip install jinja2")
    version = metadata.version("jinja2")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST_JINJA2:
        raise UsageError(f"{name}: jinja2 {version} lets chat templates break out: pip install --upgrade jinja2")
    return paths


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process; in a fork of its parent, which cannot wait for it, only its pipes are closed."""
    process.kill()
    with contextlib.suppress(OSError), process:  # closes the pipes, and waits for the end
        pass


def _one_line(reason: object) -> str:
    """Return a stranger's words as one line that is safe to print."""
    words = " ".join(str(reason).split())
    text = "".join(character if character.isprintable() else "?" for character in words)
    return text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + "..."
