"""The servers that the serving benchmark starts: what they are told, when they are ready, what they take."""

import contextlib
import http.client
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load import ROOT
from benchmarks.report import OURS
from llamalet.errors import UsageError

# llama-server's settings that compete; keys and values are float16 unless "kv q8" says Q8_0.
LLAMA_SERVER, LLAMA_SERVER_FLASH = "llama-server", "llama-server fa"
LLAMA_SERVER_Q8_CACHE = "llama-server fa kv q8"
LLAMA_SERVERS: Mapping[str, Sequence[str]] = {
    LLAMA_SERVER: ("-fa", "off"),
    LLAMA_SERVER_FLASH: ("-fa", "on"),
    LLAMA_SERVER_Q8_CACHE: ("-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"),
}

READY_S = 120.0
STOP_S = 15.0


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs.

    Attributes:
        contender: its name in the results.
        port: on 127.0.0.1.
        process: its id.
        model: the name that requests have to give.
    """

    contender: str
    port: int
    process: int
    model: str

    def body(
        self, prompt: Sequence[int], tokens: int, *, stream: bool, temperature: float, seed: int
    ) -> dict[str, Any]:
        """Return a request for so many new tokens after a prompt, drawn with top-p 0.9 or the most likely ones.

        llama-server is told to leave out the samplers that are not asked for; by default it has more, and a top-k.
        """
        body = {
            "model": self.model, "prompt": list(prompt), "max_tokens": tokens, "temperature": temperature,
            "top_p": TOP_P if temperature else 1.0, "seed": seed, "ignore_eos": True, "stream": stream,
        }  # fmt: skip
        if stream:
            body["stream_options"] = {"include_usage": True}
        if self.contender != OURS:
            body["samplers"] = ["temperature", "top_p"] if temperature else ["top_k"]
            body["top_k"] = 0 if temperature else 1
        return body


TOP_P = 0.9


def our_command(model: Path, port: int, threads: int, options: str = "") -> list[str]:
    """Return the command line of our server.

    Args:
        model: a .bin.
        port: on 127.0.0.1.
        threads: number of compute threads.
        options: more options, as a shell would take them.
    """
    command = [sys.executable, "-m", "llamalet.serve", str(model), "--port", str(port), "--threads", str(threads)]
    return [*command, *shlex.split(options)]


def llama_command(
    program: str, model: Path, port: int, threads: int, *, slots: int, context: int, options: Sequence[str]
) -> list[str]:
    """Return the command line of llama-server; continuous batching is its default.

    Args:
        program: its path.
        model: a GGUF file.
        port: on 127.0.0.1.
        threads: number of compute threads.
        slots: number of texts in progress at once.
        context: positions of each; all together are reserved at the start.
        options: of LLAMA_SERVERS. Copies of old prompts (-cram) only cost time here, because no prompt comes twice.
    """
    return [
        program, "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-t", str(threads), "-np", str(slots),
        "-c", str(slots * context), "-cram", "0", "-lv", "2", "--offline", *options,
    ]  # fmt: skip


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(contender: str, command: Sequence[str], port: int, log: Path) -> Iterator[Server]:
    """Start a server, wait until it is ready, and stop it at the end.

    Args:
        contender: its name in the results.
        command: its command line.
        port: the port in it.
        log: a file for what it prints.

    Raises:
        UsageError: if it cannot be started, ends, or is not ready after READY_S.
    """
    with open(log, "wb") as output:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise UsageError(f"{command[0]}: cannot be started: {error.strerror}") from None
        try:
            deadline = time.monotonic() + READY_S
            while get(port, "/health") is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    last = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
                    raise UsageError(f"{contender}: not ready, exit code {process.poll()}: {last}")
                time.sleep(0.05)
            models = get(port, "/v1/models") or {}
            yield Server(contender, port, process.pid, models["data"][0]["id"])
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def get(port: int, path: str) -> Any:
    """Return the JSON at a path; None if there is no server or its status is not 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        content = answer.read()
        return json.loads(content) if answer.status == 200 else None
    except OSError:
        return None
    finally:
        connection.close()


def resident_bytes(process: int) -> int:
    """Return the resident memory of a process, mapped files included, and of the processes that it has started."""
    try:
        status = Path(f"/proc/{process}/statm").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return 0
    return int(status.split()[1]) * os.sysconf("SC_PAGE_SIZE") + sum(resident_bytes(int(child)) for child in children)


def cpu_seconds(process: int) -> float:
    """Return the processor time that a process has taken, of all its threads; 0 if unknown."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
