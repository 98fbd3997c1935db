"""`python -m llamalet` is the command `llamalet`."""

from llamalet.cli import run_main

if __name__ == "__main__":
    run_main()
