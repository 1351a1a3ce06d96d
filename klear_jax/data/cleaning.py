"""What is wrong with a sample: think tags, and passages of benchmarks in its prompt."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

from klear_jax.errors import InputError

# A word is a run of letters and digits, or one character of a script without spaces.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|(?:(?![{_CJK}])[^\W_])+")
# Benchmark problems of fewer words are looked for as a whole prompt, not within one.
SHORTEST_PASSAGE = 4


def prompt_hash(messages: Sequence[Mapping[str, str]]) -> int:
    """63 bits of a prompt: of roles and contents, exactly, but for white space at the ends."""
    said = [[message["role"], message["content"].strip()] for message in messages]
    return text_hash(json.dumps(said, ensure_ascii=False))


def text_hash(text: str) -> int:
    """63 bits of a text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def think_fault(response: str) -> str | None:
    """What is wrong with the response's <think>...</think>; None where nothing is."""
    opened, closed = response.count("<think>"), response.count("</think>")
    if not opened:
        return "no <think>"
    if not closed:
        return "<think> without </think>"
    if opened > 1 or closed > 1:
        return "<think> or </think> more than once"
    before, _, rest = response.partition("<think>")
    _, closes, after = rest.partition("</think>")
    if not closes:
        return "</think> before <think>"
    if before.strip():
        return "text before <think>"
    if not after.strip():
        return "nothing after </think>"
    return None


def words(text: str) -> list[str]:
    """The words of a text: Unicode's compatible forms made one, case folded, everything
    that is neither letter nor digit left out (so `\\frac{1}{2}` is frac, 1, 2)."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class Benchmarks:
    """Passages of benchmark problems, to find in prompts.

    A prompt is contaminated if it has n words in a row in common with a problem (the paper:
    n = 9), as `words` reads both. A problem of fewer words counts where it stands as a
    whole in a prompt; and where it is the prompt, if it has fewer than SHORTEST_PASSAGE, or if
    allowed phrases leave no passage of it.
    """

    def __init__(
        self, problems: Iterable[tuple[str, str]], *, n: int, allowed: Sequence[str]
    ):
        """Takes all passages of n words of the problems.

        Args:
          problems: name and text of each.
          n: words of a passage.
          allowed: phrases that are cut out of problems and prompts first, such as "where m
            and n are relatively prime positive integers": many problems have them.

        Raises:
          InputError: a problem of which no word is left; a phrase without one.
        """
        self._allowed = [_spaced(words(phrase)) for phrase in allowed]
        if "" in self._allowed:
            phrase = allowed[self._allowed.index("")]
            raise InputError(f"the allowed phrase {phrase!r} has no word")
        # Words of a passage -> passage -> the problem that it is from.
        self._passages: dict[int, dict[str, str]] = {}
        self._whole: dict[str, str] = {}
        for name, text in problems:
            pieces = self._pieces(text)
            count, longest = sum(map(len, pieces)), max(map(len, pieces))
            if not count:
                raise InputError(
                    f"the problem {name} has no word beside the allowed phrases"
                )
            length = min(n, count)
            if length < SHORTEST_PASSAGE or longest < length:
                self._whole.setdefault(_joined(pieces), name)
                continue
            known = self._passages.setdefault(length, {})
            for passage in _passages(pieces, length):
                known.setdefault(passage, name)

    def find(self, text: str) -> tuple[str, str] | None:
        """The first passage of a problem in the text, and the problem's name."""
        pieces = self._pieces(text)
        for length, known in self._passages.items():
            for passage in _passages(pieces, length):
                if passage in known:
                    return passage, known[passage]
        whole = _joined(pieces)
        return (whole, self._whole[whole]) if whole in self._whole else None

    def _pieces(self, text: str) -> list[list[str]]:
        """The words before, between and after allowed phrases."""
        found = words(text)
        if not self._allowed:
            return [found]
        joined = _spaced(found)
        for phrase in self._allowed:
            joined = joined.replace(phrase, " | ")  # No word holds a bar.
        return [piece.split() for piece in joined.split("|")]


def _passages(pieces: Iterable[Sequence[str]], n: int) -> Iterator[str]:
    for piece in pieces:
        for i in range(len(piece) - n + 1):
            yield " ".join(piece[i : i + n])


def _spaced(found: Sequence[str]) -> str:
    """With a space of its own on each side of each word."""
    return "".join(f" {word} " for word in found)


def _joined(pieces: Iterable[Sequence[str]]) -> str:
    return " ".join(word for piece in pieces for word in piece)
