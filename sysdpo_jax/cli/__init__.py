"""The command `sysdpo`: one module a command, each with its flags as `Config` and `run(config)`."""

import shlex
from contextvars import ContextVar

# The words behind `sysdpo` of the command that runs.
ARGUMENTS: ContextVar[tuple[str, ...]] = ContextVar("ARGUMENTS", default=())


def command_line() -> str:
    """What was typed, for the record of how something was made."""
    return shlex.join(["sysdpo", *ARGUMENTS.get()])
