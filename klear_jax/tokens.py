"""Text to token ids and back: HF tokenizer.json, sentencepiece .model, chat template, stops.

The only file that knows a tokenizer library or jinja.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import sentencepiece
import tokenizers
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from klear_jax.errors import InputError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
BESIDE = (  # The vocabulary's file.
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)
EXCERPT = 200  # Characters of messages in an error.
# sentencepiece writes a space as this character, so it cannot tell the two apart.
SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # What bytes that are no text decode to.
# How byte-level vocabularies (GPT-2's and after) write bytes: what is printable in Latin-1 as
# itself, the others from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(_OTHERS)
}
QWEN3_CHAT = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with its chat template; made by `load`.

    Attributes:
      path: the vocabulary's file; error messages name it.
      vocab_size: largest id + 1.
      stop_ids: ids that end a response; the first ends an assistant's turn in training.
      fingerprint: of all that decides on the ids of a conversation.
    """

    path: epath.Path
    vocab_size: int
    stop_ids: tuple[int, ...]
    fingerprint: str
    _vocabulary: "_HuggingFace | _SentencePiece"
    _template: jinja2.Template
    _named_tokens: Mapping[str, str]

    def encode(self, text: str) -> list[int]:
        """Ids of text. Nothing is added; the text of a special token becomes its id."""
        return self._vocabulary.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids without the special tokens; ids outside the vocabulary are skipped."""
        return self._vocabulary.decode([int(i) for i in ids])

    def name_of(self, i: int) -> str:
        """What the vocabulary calls a token: of a special one its text, of others a spelling
        of its own."""
        return self._vocabulary.name_of(i)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> str:
        """The chat template's text for messages of {role, content}."""
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._named_tokens,
            )
        except Exception as error:  # A template may do anything.
            shown = repr(messages)[:EXCERPT]
            raise InputError(
                f"{self.path.parent}: the chat template refuses {shown}: {error}"
            ) from error

    @property
    def markers(self) -> set[str]:
        """Texts that become control tokens: of the chat, and of the ends of texts."""
        chat = {
            marker
            for marker in (IM_START, IM_END)
            if self._vocabulary.id_of(marker) is not None
        }
        return chat | set(self._named_tokens.values())

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of messages up to where the assistant's response begins."""
        return self.encode(self.render(messages, add_generation_prompt=True))

    def save(self, folder: epath.PathLike) -> None:
        """Copies the tokenizer's files into folder, for an export; an InputError if one of
        them is a link to a file of this machine that is not part of the tokenizer."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        beside = [(self.path.parent / name, name) for name in BESIDE]
        # The vocabulary that was loaded, and no other that lies there, under the usual name.
        for source, name in [(self.path, f"tokenizer{self.path.suffix}"), *beside]:
            if source.exists():
                _check_own(source)
                source.copy(folder / name, overwrite=True)

    def export(self, folder: epath.PathLike) -> None:
        """`save`, so that transformers reads the folder and ends a response where we do."""
        self.save(folder)
        folder = epath.Path(folder)
        _change_json(
            folder / "generation_config.json", {"eos_token_id": list(self.stop_ids)}
        )
        with _refusal(f"{self.path} cannot be written as a tokenizer.json"):
            converted = self._vocabulary.to_hugging_face()
        if converted:
            (folder / "tokenizer.json").write_text(converted)
        # Left to itself, transformers takes a class by the model's type, and some classes
        # split texts in their own way, whatever tokenizer.json says.
        file = folder / "tokenizer_config.json"
        if converted or "tokenizer_class" not in _read_json(file):
            _change_json(file, {"tokenizer_class": "PreTrainedTokenizerFast"})


def _check_own(path: epath.Path) -> None:
    # A stranger's link would have whatever it names published with the model. Hugging Face
    # keeps the files of MODEL/snapshots/VERSION in MODEL/blobs.
    folder, target = (pathlib.Path(os.path.realpath(p)) for p in (path.parent, path))
    blobs = folder.parent.parent / "blobs"
    if not (target.is_relative_to(folder) or target.is_relative_to(blobs)):
        raise InputError(
            f"{path} is a link out of its folder: put the file itself there"
        )


def load(path: epath.PathLike) -> Tokenizer:
    """Reads a tokenizer from its folder, or from its file with the others beside it.

    The folder holds tokenizer.json or tokenizer.model, and tokenizer_config.json (end of
    text, chat template); chat_template.jinja and generation_config.json (stop ids) count
    where they are.

    Raises:
      InputError: a file is missing or broken; there is no chat template, or one whose
        markers are not single tokens; no token ends a response.
    """
    path = _vocabulary_file(epath.Path(path))
    config = _read_json(path.parent / "tokenizer_config.json")
    named = _named_tokens(path.parent, config)
    kind = _HuggingFace if path.suffix == ".json" else _SentencePiece
    more = config.get("additional_special_tokens") or []
    special = set(named.values()) | {_text(path.parent, token) for token in _list(more)}
    data = path.read_bytes()
    with _refusal(f"{path} is not a whole tokenizer file"):
        vocabulary = kind(data, special)
        vocabulary.encode("\0é")  # Here, not in a prompt: what the model cannot spell.
    source = _template_source(path.parent, config)
    template = _compile(path.parent, source)
    for marker in (IM_START, IM_END):
        if marker in source and vocabulary.encode(marker) != [vocabulary.id_of(marker)]:
            raise InputError(
                f"{path}: the chat template needs {marker} as a single token,"
                " but the vocabulary has none"
            )
    stop_ids = _stop_ids(path, vocabulary, named)
    made_of = b"\0".join([data, source.encode(), repr((stop_ids[0], named)).encode()])
    return Tokenizer(
        path=path,
        vocab_size=vocabulary.size,
        stop_ids=stop_ids,
        fingerprint=hashlib.sha256(made_of).hexdigest()[:16],
        _vocabulary=vocabulary,
        _template=template,
        _named_tokens=named,
    )


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises InputError unless every id has one of the model's vocab_size rows."""
    needed = max(tokenizer.vocab_size, max(tokenizer.stop_ids) + 1)
    if needed > vocab_size:
        raise InputError(
            f"{tokenizer.path} has ids up to {needed - 1}, which does not fit a model"
            f" with a vocabulary of {vocab_size}"
        )


def cut_at_stop(
    tokenizer: Tokenizer, ids: Sequence[int], stop_strings: Sequence[str]
) -> tuple[Sequence[int], bool]:
    """Cuts a response after the token that completes the first stop string.

    Returns:
      The ids kept, and whether a stop string was found. The last token may carry text
      beyond the stop string; a special token's text is never found (use stop_ids).
    """
    if "" in stop_strings:
        raise InputError("a stop string is empty")

    def has_stop(length: int) -> bool:
        text = tokenizer.decode(ids[:length])
        return any(stop in text for stop in stop_strings)

    if not stop_strings or not has_stop(len(ids)):
        return ids, False
    too_short, enough = 0, len(ids)
    while enough - too_short > 1:
        middle = (too_short + enough) // 2
        if has_stop(middle):
            enough = middle
        else:
            too_short = middle
    return ids[:enough], True


class Stream:
    """The text of tokens as they come: a character is told when the last of its bytes is
    there, so that what was told stays true.

    All that `add` returns, and what `end` does, is `decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Tokens whose text was told, as far back as what follows may depend on them.
        self._told: list[int] = []
        self._untold: list[int] = []

    def add(self, ids: Iterable[int]) -> str:
        """What can be told now."""
        self._untold += ids
        text = self.end()
        if not text or text.endswith(NO_CHARACTER):
            return ""
        self._told, self._untold = self._untold, []
        return text

    def end(self) -> str:
        """What is left when no more tokens come, bytes that make no character among it."""
        before = self._tokenizer.decode(self._told)
        return self._tokenizer.decode(self._told + self._untold)[len(before) :]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one token shows of a text; some tokens together, where they share a character."""

    text: str
    count: int  # Of tokens.
    plain: bool  # False: no text, but the name of a special token, or bytes such as <0xE2>.


def speller(tokenizer: Tokenizer) -> Callable[[Sequence[int]], list[Piece]]:
    """A function from ids to their pieces. The plain ones make up what `decode` says of the
    ids, where that is whole characters."""

    @functools.cache
    def text_of(before: tuple[int, ...], ids: tuple[int, ...]) -> str:
        # A first token may lose its space, so there is another before it.
        whole, known = tokenizer.decode(before + ids), tokenizer.decode(before)
        return whole.removeprefix(known)

    def spell(ids: Sequence[int]) -> list[Piece]:
        ids = tuple(ids)
        pieces, before, start = [], (), 0
        while start < len(ids):
            # A character has at most four bytes, and a token at least one.
            for end in range(start + 1, min(start + 4, len(ids)) + 1):
                text = text_of(before, ids[start:end])
                if NO_CHARACTER not in text:
                    break
            else:
                text, end = "", start + 1
            if text:
                pieces.append(Piece(text, end - start, True))
                before = ids[start:end]
            else:
                pieces.append(Piece(_stand_in(tokenizer, ids[start]), 1, False))
                end = start + 1
            start = end
        return pieces

    return spell


def _stand_in(tokenizer: Tokenizer, i: int) -> str:
    """The name of a special token; of bytes their numbers, as sentencepiece names them."""
    name = tokenizer.name_of(i)
    special = not tokenizer.decode([i])
    if special or name.startswith("<0x") or not set(name) <= set(BYTES):
        return name
    return "".join(f"<0x{BYTES[c]:02X}>" for c in name)


def train_sentencepiece(
    texts: Iterable[str],
    folder: epath.PathLike,
    *,
    symbols: Sequence[str],
    vocab_size: int | None = None,
) -> None:
    """Trains a lossless tokenizer and writes its .model and tokenizer_config.json.

    `decode(encode(text)) == text` for any text without special tokens: what the texts
    do not show is spelled in bytes. The same texts give the same files.

    Args:
      texts: what to learn from.
      folder: where the two files go.
      symbols: strings that are always one token each, beside the chat markers.
      vocab_size: of a BPE vocabulary. None: a token for each character and none for
        longer strings, which small models learn fastest from.

    Raises:
      InputError: no text, or a vocab_size that sentencepiece cannot reach.
    """
    folder = epath.Path(folder)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe" if vocab_size else "char",
            vocab_size=vocab_size or 2**20,  # An upper bound for characters.
            character_coverage=1.0,
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            user_defined_symbols=[
                # sentencepiece looks for them where spaces are marks already.
                symbol.replace(" ", SPACE_MARK)
                for symbol in dict.fromkeys([IM_START, IM_END, "\n", " ", *symbols])
            ],
            # Only <unk> stands before the symbols: ends are the chat's own markers.
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=2**24,  # Bytes; longer texts would be left out unseen.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(f"cannot train a tokenizer: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "eos_token": IM_END,
        "additional_special_tokens": [IM_START, IM_END],
        "chat_template": QWEN3_CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


@contextlib.contextmanager
def _refusal(sentence: str) -> Iterator[None]:
    """What goes wrong within is an InputError: tokenizers raises bare exceptions, and panics
    of Rust, which are no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{sentence}: {error}") from error


class _HuggingFace:
    """The vocabulary of a tokenizer.json, which itself says which tokens are special."""

    def __init__(self, data: bytes, special: set[str]):
        del special
        self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def name_of(self, i: int) -> str:
        return self._tokenizer.id_to_token(i) or f"<{i}>"

    def encode(self, text: str) -> list[int]:
        what = f"a text of {len(text)} characters, {text[:EXCERPT]!r}"
        with _refusal(f"the tokenizer fails on {what}"):  # Such as millions of spaces.
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def to_hugging_face(self) -> None:
        """Nothing: it is one."""


class _SentencePiece:
    """The vocabulary of a tokenizer.model."""

    def __init__(self, data: bytes, special: set[str]):
        self._data, self._special = data, special
        self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.size = self._model.vocab_size()
        if not self.size:  # An empty file parses.
            raise ValueError("it holds no tokens")
        control = filter(self._model.is_control, range(self.size))
        by_hand = {self._model.id_to_piece(i): [i] for i in control}
        self._skipped = {i for i in map(self.id_of, special) if i is not None}
        spelled = [self.id_of(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        if None not in spelled:
            by_hand[SPACE_MARK] = [i for i in spelled if i is not None]
        self._by_hand = by_hand
        self._split = re.compile(f"({'|'.join(map(re.escape, by_hand)) or '(?!)'})")

    def id_of(self, token: str) -> int | None:
        i = self._model.piece_to_id(token)
        return None if i == self._model.unk_id() else i

    def name_of(self, i: int) -> str:
        return self._model.id_to_piece(i) if 0 <= i < self.size else f"<{i}>"

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            ids += self._by_hand.get(part) or self._model.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(
            [i for i in ids if 0 <= i < self.size and i not in self._skipped]
        )

    def to_hugging_face(self) -> str | None:
        """A tokenizer.json that does the same; None for a kind that `train_sentencepiece`
        does not make, and which transformers may read itself, or not."""
        protos: Any = sentencepiece_model_pb2  # Its classes are made as it is imported.
        kinds = protos.ModelProto.SentencePiece
        trained_as = protos.TrainerSpec
        model = protos.ModelProto.FromString(self._data)
        kind, rule = model.trainer_spec.model_type, model.normalizer_spec
        if (
            kind not in (trained_as.BPE, trained_as.CHAR)
            or not model.trainer_spec.byte_fallback
            or rule.name != "identity"
            or rule.add_dummy_prefix
            or rule.remove_extra_whitespaces
        ):
            return None
        # Without its marks for spaces, a real mark is what it is: spelled in bytes.
        pieces = [piece.piece.replace(SPACE_MARK, " ") for piece in model.pieces]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        of_kind = {
            kind: [
                name
                for name, piece in zip(pieces, model.pieces, strict=True)
                if piece.type == kind
            ]
            for kind in (kinds.NORMAL, kinds.USER_DEFINED, kinds.CONTROL)
        }
        # The pieces stand in the order in which they are merged.
        merges = [
            (piece[:n], piece[n:])
            for piece in of_kind[kinds.NORMAL]
            for n in range(1, len(piece))
            if piece[:n] in vocab and piece[n:] in vocab
        ]
        found = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocab, merges, byte_fallback=True)
        )
        found.decoder = tokenizers.decoders.Sequence(
            [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
        )
        for name in of_kind[kinds.USER_DEFINED] + of_kind[kinds.CONTROL]:
            token = tokenizers.AddedToken(name, normalized=False)
            if name in self._special or name in of_kind[kinds.CONTROL]:
                found.add_special_tokens([token])
            else:
                found.add_tokens([token])
        return found.to_str()


def _vocabulary_file(path: epath.Path) -> epath.Path:
    if not path.is_dir():
        if path.suffix not in (".json", ".model") or not path.exists():
            raise InputError(f"{path} is no tokenizer.json, .model file or folder")
        return path
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).exists():
            return path / name
    raise InputError(f"{path} holds neither tokenizer.json nor tokenizer.model")


def _read_json(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not whole JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object")
    return content


def _change_json(path: epath.Path, changes: dict[str, Any]) -> None:
    """Sets keys of a JSON object, whose file need not be there."""
    path.write_text(json.dumps(_read_json(path) | changes, indent=2) + "\n")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(folder: epath.Path, token: Any) -> str:
    """The text of a token that is named in tokenizer_config.json, by itself or as an entry."""
    text: Any = token.get("content") if isinstance(token, Mapping) else token
    try:
        text.encode()
    except (AttributeError, UnicodeEncodeError):  # No text, or half a surrogate pair.
        raise InputError(
            f"{folder / 'tokenizer_config.json'} names a token {token!r}, which is no text"
        ) from None
    return text


def _named_tokens(folder: epath.Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Tokens that a chat template may call by name."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {name: _text(folder, config[name]) for name in names if config.get(name)}


def _stop_ids(
    path: epath.Path, vocabulary: _HuggingFace | _SentencePiece, named: dict[str, str]
) -> tuple[int, ...]:
    ids = [vocabulary.id_of(IM_END)]
    if "eos_token" in named:
        ids.append(vocabulary.id_of(named["eos_token"]))
        if ids[-1] is None:
            raise InputError(
                f"{path} lacks the eos_token {named['eos_token']!r} of"
                " tokenizer_config.json"
            )
    file = path.parent / "generation_config.json"
    more = _list(_read_json(file).get("eos_token_id", []))
    if wrong := [i for i in more if i is not None and not _is_id(i, vocabulary.size)]:
        raise InputError(
            f"{file}: an eos_token_id is a number below {vocabulary.size}, not {wrong[0]!r}"
        )
    ids = tuple(dict.fromkeys(i for i in ids + more if i is not None))
    if not ids:
        raise InputError(
            f"{path}: no token ends a response; name one as eos_token in"
            " tokenizer_config.json"
        )
    return ids


def _is_id(value: Any, size: int) -> bool:
    return type(value) is int and 0 <= value < size


def _template_source(folder: epath.Path, config: Mapping[str, Any]) -> str:
    if (folder / "chat_template.jinja").exists():
        try:
            return (folder / "chat_template.jinja").read_text()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{folder / 'chat_template.jinja'} is no text: {error}"
            ) from None
    source = config.get("chat_template")
    if isinstance(source, list):  # Several templates, each with its name.
        entries = [entry for entry in source if isinstance(entry, Mapping)]
        found = [x.get("template") for x in entries if x.get("name") == "default"]
        source = found[-1] if found else None
    if not source or not isinstance(source, str):
        raise InputError(
            f"{folder} has no chat template (chat_template in tokenizer_config.json,"
            " or chat_template.jinja)"
        )
    return source


def _compile(folder: epath.Path, source: str) -> jinja2.Template:
    """The template in a sandbox with the names that Hugging Face's templates use."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    # jinja's own tojson escapes for HTML.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    # strftime_now is left out: a prompt must not depend on the day. Templates that ask for it
    # have a date of their own for where it is not known.
    try:
        source.encode()  # No half of a surrogate pair.
        return environment.from_string(source)
    except Exception as error:  # Such as one that is nested too deeply.
        raise InputError(f"{folder}: the chat template is broken: {error}") from error


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
