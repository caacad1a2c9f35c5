"""The one base of errors that are for the user: the command line prints their text and no traceback."""


class UserError(ValueError):
    """Something outside the code is wrong. The text says what came, what was expected and how to mend it."""
