"""What ends or accompanies a command: errors and warnings whose text alone is printed, and stops in good order."""


class Notice(UserWarning):
    """Something that does not stop the work, and that its user should know: a command prints its text, on one line."""


class Stopped(Exception):
    """The run was asked to end, has saved and has said so. It goes on when the same command is started again."""

    status = 75  # that the command line exits with: EX_TEMPFAIL of sysexits.h, "try again"


class Interrupted(Stopped):
    """The same by Ctrl-C: whoever pressed it does not want the run to be started again for it."""

    status = 130  # of shells after SIGINT


class UserError(ValueError):
    """Something outside the code is wrong. The text says what came, what was expected and how to mend it."""
