"""Exceptions that are one sentence to the user, and not worth a second try."""


class InputError(ValueError):
    """One sentence that names the file, line or key, and what would be right.

    Commands print it alone, without a traceback, and exit with 2.
    """

    def __init__(self, sentence: str):
        # Also where it quotes input that has several lines.
        super().__init__(" ".join(sentence.splitlines()))


class Stopped(Exception):
    """The run has ended itself (`guards`), and says why; commands exit with 3."""
