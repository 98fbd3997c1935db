"""`llamalet serve`: from the command line to a server that listens, and to its end."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Sequence

from llamalet.errors import UsageError, note
from llamalet.model_options import choose_model
from llamalet.options import read_options
from llamalet.serve.options import WILDCARDS, ServeOptions

DESCRIPTION = """Serve a model over HTTP, with OpenAI's endpoints and a page that shows how it thinks.

A text is the same, bit for bit, alone and among others."""


def main(argv: Sequence[str]) -> int:
    """Serve as the command line says, until Ctrl-C or SIGTERM."""
    options = read_options(
        ServeOptions, argv, program="llamalet serve", description=DESCRIPTION, positional=("model",),
        aliases={"model": "--checkpoint", "tokenizer": "-z"},
    )  # fmt: skip
    rules = options.rules()
    try:
        import starlette
        import uvicorn
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise UsageError(f"the server needs the package {error.name}: pip install 'llamalet[serve]'") from None
    del starlette, uvicorn
    from llamalet.serve.server import Service

    if options.host in WILDCARDS and not rules.keys:
        note("llamalet: without a key everyone in the network can use this server; give --api-key-file")
    path = options.model or choose_model()
    with contextlib.closing(listen(options.host, options.port)) as listener:
        return asyncio.run(Service(options, rules, listener).run(path))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    Raises:
        UsageError: if the address is none of this machine, or the port is taken or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            what = "is in use by another program; stop that, or give --port another number"
        elif isinstance(error, PermissionError):
            what = "is not allowed; give --port a number from 1024 up"
        else:
            what = f"cannot be listened on: {getattr(error, 'strerror', None) or error}; see --host"
        raise UsageError(f"{host}:{port}: {what}") from None
