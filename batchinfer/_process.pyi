"""What to do where a library ends the process, or does not come back (C++, csrc/bindings/process.cpp)."""

def restart_at_exit(argv: list[str]) -> None:
    """From now on exit(3) executes this command instead, once, as the same process; argv[0] is a path. ValueError if
    it is empty."""

def end_at_exit() -> None:
    """exit(3) ends the process again."""

def restart(reason: str) -> None:
    """Execute the command of :func:`restart_at_exit` now, saying why; nothing if the process may end."""
