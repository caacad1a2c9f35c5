"""The one base of errors that are for the user, and of warnings: the command line prints their text alone."""


class Notice(UserWarning):
    """Something that does not stop the work, and that its user should know: a command prints its text, on one line."""


class UserError(ValueError):
    """Something outside the code is wrong. The text says what came, what was expected and how to mend it."""
