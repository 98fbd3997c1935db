"""`python -m llamalet` is the command `llamalet`, which pip makes from `run`."""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])

from llamalet import startup


def run() -> None:
    """Run the command `llamalet` and exit."""
    startup.begin()
    from llamalet import cli, command  # takes a moment, in which Ctrl-C would end in a traceback without `begin`

    command.run(cli.main)


if __name__ == "__main__":
    run()
