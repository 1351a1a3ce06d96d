"""Rows as people publish them -> examples: one declared mapping for each shape."""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from klear_jax.errors import InputError

SURROGATE = re.compile("[\ud800-\udfff]")
ROLES = {"human": "user", "gpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of a data set.

    Attributes:
      origin: where it stands, for messages: file and line, or data set, split and row.
      prompt_id: int32, unique in the data set: a part of the key of all randomness.
      messages: {role, content} dicts; the prompt, before the chat template.
      answer: what the response must reach: text, a list of texts of which any is right, or
        an object, as tests are; None where the row has none.
      response: a demonstration; None where the row has none.
      source: what the row says of its origin, which decides on its reward; '' for nothing.
      date: the day of a problem, such as 2025-02-01; '' for none.
    """

    origin: str
    prompt_id: int
    messages: tuple[Mapping[str, str], ...]
    answer: Any
    response: str | None
    source: str = ""
    date: str = ""

    @property
    def problem(self) -> str:
        """What the last message says."""
        return self.messages[-1]["content"]


@dataclasses.dataclass(frozen=True)
class Fields:
    """Where a row says what. 'a.b' is a key within a key, or a key of that name; of 'a|b'
    it is the first that is there.

    Attributes:
      prompt: text, or messages of {role, content} or {from, value}. Where `response` finds
        nothing, a last message of the assistant is the response.
      response: text.
      thinking: text of the chain of thought, where the response lacks it.
      answer: text, number, list of texts or object.
      data_source: text.
      system: text of a message that goes before the prompt.
      date: text that begins with a day, such as 2025-02-01.
      replace: text of the response -> what takes its place.
    """

    prompt: str
    response: str = ""
    thinking: str = ""
    answer: str = ""
    data_source: str = ""
    system: str = ""
    date: str = ""
    replace: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def columns(self) -> set[str]:
        """The keys of a row that are looked at."""
        paths = "|".join(
            getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "replace"
        ).split("|")
        return {*paths, *(path.split(".")[0] for path in paths)} - {""}


ANSWER = "answer|reward_model.ground_truth"
SHAPES = {
    # Ours, the authors' RL rows and benchmark files, and lists of messages.
    "any": Fields(
        prompt="prompt|problem|question|messages|conversations",
        response="response",
        answer=f"{ANSWER}|meta.answer|meta.solution",
        data_source="data_source",
        date="date",
    ),
    "prompt_response": Fields(
        prompt="prompt|problem|question|instruction",
        response="response|output|completion",
        answer=ANSWER,
        data_source="data_source",
    ),
    # Lists of {role, content} or {from, value}; the last of the assistant is the response.
    "messages": Fields(prompt="messages", answer=ANSWER, data_source="data_source"),
    "sharegpt": Fields(prompt="conversations", system="system", answer=ANSWER),
    # OpenThoughts-114k, without its long system prompt and with the tags of Qwen3; and the
    # columns of its part 'metadata'.
    "openthoughts": Fields(
        prompt="conversations",
        replace={
            "<|begin_of_thought|>": "<think>",
            "<|end_of_thought|>": "</think>",
            "<|begin_of_solution|>": "",
            "<|end_of_solution|>": "",
        },
    ),
    "openthoughts_metadata": Fields(
        prompt="problem", thinking="deepseek_reasoning", response="deepseek_solution"
    ),
    "klear_rl": Fields(
        prompt="prompt", answer="reward_model.ground_truth", data_source="data_source"
    ),
    # The authors' AIME 2024 and 2025 and HMMT files.
    "benchmark": Fields(prompt="messages", answer="answer|meta.answer|meta.solution"),
}


class BadRow(InputError):
    """A row that cannot be used: why, in words that are the same for all such rows, and
    what is particular about this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def from_json(row: bytes | Mapping[str, Any]) -> Mapping[str, Any]:
    """The object that a line of JSON is, or a BadRow; what is one already stays."""
    if isinstance(row, Mapping):
        return row
    try:
        row = json.loads(row, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise BadRow("not JSON", str(error)) from None
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
    return row


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def to_example(
    row: bytes | Mapping[str, Any], fields: Fields, *, origin: str, prompt_id: int
) -> Example:
    """The row, or the line of JSON that holds it, as an Example; or a BadRow."""
    row = from_json(row)
    messages, last = read_prompt(row, fields)
    response = _find(row, fields.response)
    if response is None:
        response = last
    if response is not None:
        response = _text("response", response)
        for old, new in fields.replace.items():
            response = response.replace(old, new)
        if (thinking := _find(row, fields.thinking)) is not None:
            thinking = _text("thinking", thinking)
            response = f"<think>\n{thinking.strip()}\n</think>\n\n{response}"
    answer = _find(row, fields.answer)
    answer = None if answer == "" else _answer(answer)
    if answer is None and response is None:
        raise BadRow("neither answer nor response", _keys(row))
    source = _find(row, fields.data_source)
    if source not in (None, "") and not _is_text(source):
        raise BadRow("data_source must be text", repr(source))
    date = _find(row, fields.date)
    date = "" if date in (None, "") else _text("date", date)[:10]
    return Example(
        origin, prompt_id, tuple(messages), answer, response, source or "", date
    )


def read_prompt(
    row: Mapping[str, Any], fields: Fields
) -> tuple[list[dict[str, str]], str | None]:
    """The messages up to where the assistant answers, and its answer if that is the last of
    them; or a BadRow."""
    messages = _messages(row, fields.prompt)
    system = _find(row, fields.system)
    if system not in (None, ""):
        messages = [{"role": "system", "content": _text("system", system)}, *messages]
    response = None
    if messages[-1]["role"] == "assistant":
        *messages, last = messages
        response = last["content"]
    if not messages or messages[-1]["role"] == "assistant":
        raise BadRow("the prompt does not end with a message to the assistant")
    return messages, response


def _find(row: Mapping[str, Any], where: str) -> Any:
    """What stands there, None if nothing."""
    for path in where.split("|") if where else ():
        value = row.get(path)
        if value is None:
            value = row
            for key in path.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def _keys(row: Mapping[str, Any]) -> str:
    names = [repr(name[:40]) for name in itertools.islice(row, 12)]
    return f"the row has {', '.join(names) or 'nothing'}"


def _messages(row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    prompt = _find(row, where)
    if _is_text(prompt):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence) or isinstance(prompt, str) or not prompt:
        raise BadRow(
            f"{where.replace('|', ' or ')} must be text or messages", _keys(row)
        )
    messages = []
    for message in prompt:
        if not isinstance(message, Mapping):
            raise BadRow("a message is not an object")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if role == "system" and content == "":
            continue
        if not _is_text(role) or not _is_text(content):
            raise BadRow("a message is not a role and a content in text")
        messages.append({"role": ROLES.get(role, role), "content": content})
    if not messages:
        raise BadRow("no message to the assistant")
    return messages


def _answer(answer: Any) -> Any:
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    if isinstance(answer, list):
        good = bool(answer) and all(map(_is_text, answer))
    elif isinstance(answer, dict):
        good = _is_json(answer)
    else:
        good = answer is None or _is_text(answer)
    if not good:
        raise BadRow(
            "answer must be text that is not empty, a list of such, or an object"
        )
    return answer


def _is_json(value: Any) -> bool:
    try:
        return not SURROGATE.search(json.dumps(value, ensure_ascii=False))
    except TypeError:  # Parquet knows dates and bytes.
        return False


def _text(name: str, value: Any) -> str:
    if not _is_text(value):
        raise BadRow(f"{name} must be text that is not empty")
    return value


def _is_text(value: Any) -> bool:
    """Whether value is text that UTF-8 can hold (no half of a surrogate pair)."""
    return isinstance(value, str) and value != "" and not SURROGATE.search(value)
