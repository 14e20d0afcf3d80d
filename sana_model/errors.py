"""The two kinds of failure that a person can do something about.

The command line prints the message of either as one line, without a traceback, and exits with `exit_status`.
Everything else is a bug of ours and keeps its traceback (exit status 1).
"""


class UserError(Exception):
    """What was asked for cannot be done as asked: a wrong flag, a damaged file, a folder of another model."""

    exit_status = 2


class MissingError(UserError):
    """What was asked for is right, but this machine lacks something: a GPU, a package, memory."""

    exit_status = 3
