"""Exceptions that are one sentence to the user, and not worth a second try."""

import errno

LONGEST = 10_000  # Characters of a sentence; of more, its beginning.
# Of storage that does not answer now, and may again.
_PASSING = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
}


class InputError(ValueError):
    """One sentence that names the file, line or key, and what would be right.

    Commands print it alone, without a traceback, and exit with 2.
    """

    def __init__(self, sentence: str):
        # Also where it quotes input, which may have several lines, or escapes for a terminal.
        shown = " ".join(sentence.splitlines())[:LONGEST]
        super().__init__(
            "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
        )


class Stopped(Exception):
    """The run has ended itself (`guards`), and says why; commands exit with 3."""


def let_pass(error: Exception) -> None:
    """Raises the error again if it tells of storage that fails, rather than of what lies there:
    that is not the user's fault, and the same command may go on."""
    if isinstance(error, OSError) and error.errno in _PASSING:
        raise error
