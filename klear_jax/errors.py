"""Exceptions that are one sentence to the user, and not worth a second try."""


class InputError(ValueError):
    """One sentence that names the file, line or key, and what would be right.

    Commands print it alone, without a traceback, and exit with 2.
    """


class Stopped(Exception):
    """The run has ended itself (`guards`), and says why; commands exit with 3."""
