"""The options of `llamalet serve`."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llamalet.checks import not_positive
from llamalet.errors import ConfigError, UsageError
from llamalet.files import read_file, reading
from llamalet.model_options import ModelOptions
from llamalet.serve.guard import LOCAL, Rules

KEY_VARIABLE = "LLAMALET_API_KEY"
WILDCARDS = ("0.0.0.0", "::")  # of --host: all addresses of the machine
ORIGIN = re.compile(r"https?://[^/\s]+|null|\*|[a-z-]+-extension://[^/\s]+")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ModelOptions):
    """What to serve, and to whom."""

    model: str | None = None
    """the model's file or folder, also as the first word; if not given, the newest .bin under out/, else the demo
    model"""
    host: str = "127.0.0.1"
    """the address to listen on; 0.0.0.0 lets the network in, and then there should be a key"""
    port: int = 8080
    """the port; 0 takes a free one"""
    alias: tuple[str, ...] = ()
    """the model's name for clients, or several with commas between them; the name of its file if not given"""
    chat_template: str | None = None
    """llama2, llama3, or a file with a Jinja template; the model's own if not given"""
    api_key_file: str | None = None
    """a file with the key that clients must send, or several, one a line; the variable LLAMALET_API_KEY may have one"""
    allow_host: tuple[str, ...] = ()
    """other names of this machine that requests may come for, with commas between them; * allows all"""
    allow_origin: tuple[str, ...] = ()
    """origins whose pages may use the server, like http://localhost:3000, with commas between them; null is a page that
    was opened as a file, * allows all"""
    batch_size: int = 64
    """number of texts in progress at once, at most 64"""
    max_queue: int = 512
    """number of texts that may wait for a place; further requests get 503"""
    queue_seconds: float = 120.0
    """how long a request may wait for a place until it gets 503"""
    kv_mb: int | None = None
    """memory for the keys and values of the texts in progress, in MB; half of what is free if not given"""
    prefix_cache_mb: int = 256
    """memory for keys and values that are kept for texts that begin alike, in MB; 0 keeps none"""
    max_body_mb: float = 4.0
    """size of a request, at most, in MB"""
    client_seconds: float = 30.0
    """how long a client may take to send a request, or to read what was written, until it is cut off"""
    drain_seconds: float = 10.0
    """how long texts in progress may go on after Ctrl-C or SIGTERM"""
    log: bool = True
    """print a line for each request; --no-log prints none"""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = not_positive(self, "threads", "batch_size", "max_queue", "kv_mb")
        if self.batch_size > 64:
            problems.append(f"batch_size={self.batch_size}: must be at most 64")
        if not 0 <= self.port < 1 << 16:
            problems.append(f"port={self.port}: must be between 0 (a free one) and 65535")
        if self.prefix_cache_mb < 0:
            problems.append(f"prefix_cache_mb={self.prefix_cache_mb}: must not be negative")
        for name in ("queue_seconds", "client_seconds", "drain_seconds", "max_body_mb"):
            if not 0 < getattr(self, name) <= 1e6:
                problems.append(f"{name}={getattr(self, name)}: must be a positive number")
        for origin in self.allow_origin:
            if not ORIGIN.fullmatch(origin):
                problems.append(f"allow_origin={origin}: must be like http://localhost:3000, null or *")
        for host in self.allow_host:
            if "/" in host or host.count(":") == 1:
                problems.append(f"allow_host={host}: must be a name or an address, without a port")
        ConfigError.raise_for(problems)

    def rules(self, environment: Mapping[str, str] = os.environ) -> Rules:
        """Return who may use the server.

        Raises:
            UsageError: if there is a file of keys that cannot be read or has none, or a key cannot be sent.
        """
        keys = []
        if (key := environment.get(KEY_VARIABLE)) is not None:
            keys.append(_checked_key(key.encode(errors="surrogateescape"), KEY_VARIABLE))
        if self.api_key_file is not None:
            with reading(Path(self.api_key_file), UsageError):
                lines = read_file(Path(self.api_key_file)).splitlines()
            found = [_checked_key(line.strip(), self.api_key_file) for line in lines if line.strip()]
            if not found:
                raise UsageError(f"{self.api_key_file}: has no key; put one on a line of its own")
            keys += found
        hosts = {host.lower().strip("[]") for host in (*self.allow_host, self.host)} - set(WILDCARDS)
        return Rules(
            hosts=frozenset(hosts | LOCAL), any_address=self.host in WILDCARDS,
            origins=frozenset(origin.lower() for origin in self.allow_origin), keys=tuple(keys),
        )  # fmt: skip


def _checked_key(key: bytes, where: str) -> bytes:
    """Return a key that a header can have.

    Raises:
        UsageError: if it is none.
    """
    if not re.fullmatch(rb"[!-~]+", key):
        raise UsageError(f"{where}: a key must be one word of ASCII characters")
    return key
