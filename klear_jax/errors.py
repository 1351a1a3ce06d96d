"""The one exception that means: what the user gave is wrong, and this is how."""


class InputError(ValueError):
    """One sentence that names the file, line or key, and what would be right.

    Commands print it alone, without a traceback, and exit with 2.
    """
