"""Answers prompts with a model, and shows the text as it comes.

    python -m klear_jax.generate --workdir=runs/gppo_tiny --prompt="7+5-3="

The model is the newest checkpoint of a workdir, or --model=FOLDER: a Hugging Face folder or
another workdir. A prompt is --prompt=TEXT; the text of --file=FILE, or each of its rows if it
is .jsonl or .parquet; or standard input. Where that is a terminal, each line is a prompt by
itself, and an empty one ends.

Samples go to standard output, one after the other, on a terminal with all in <think> tags
dimmed; how many tokens there were, and how fast they came, goes to standard error.
"""

import collections
import dataclasses
import functools
import itertools
import math
import os
import sys
import time
import types
import unicodedata
from collections.abc import Sequence
from typing import TextIO

import jax
import jax.numpy as jnp
from etils import epath

from klear_jax import checkpoint, config, hf_weights, hosts, qwen3, sampler, tokens
from klear_jax.data.samples import read_prompts
from klear_jax.errors import InputError
from klear_jax.sampling import Sampling
from klear_jax.sharding import Layout, MeshConfig, make_mesh, platform

TEMPERATURE, TOP_P = 0.6, 0.95  # Of the paper's evaluations.
# Ours: a laptop has memory for their keys and values. The paper's evaluations have 32,768.
MAX_NEW_TOKENS = 4_096
NUM_SLOTS = 8  # Of a replica; a single sample has a program for one.
DECODE_STEPS = 4  # Tokens that come at once: fewer look smoother, and cost more calls.
ROWS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
# The layout of `configs/sections.py`.
RULES = {
    "batch": ("data", "fsdp"),
    "seq": (),
    "residual": ("tensor",),
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "head_dim": (),
    "norm": (),
}
THINK = ("<think>", "</think>")
DIM, PLAIN = "\x1b[2m", "\x1b[22m"

Prompt = tuple[str, list[dict[str, str]]]  # Where it is from, and its messages.


@dataclasses.dataclass(frozen=True)
class Settings:
    """How prompts are answered."""

    sampling: Sampling
    max_new_tokens: int | None  # None: MAX_NEW_TOKENS, or what the model has room for.
    num_samples: int
    seed: int
    system: str  # A message before prompts that have no such message; '': none.
    raw: bool  # The text of a prompt is continued, without the chat template.

    def __post_init__(self):
        for name in ("max_new_tokens", "num_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, not {value}")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"--seed must be from 0 to {2**31 - 1}, not {self.seed}")
        if self.raw and self.system:
            raise InputError(
                "--system is a message of the chat template, which --raw leaves out"
            )


def main(argv: list[str]) -> None:
    """The command, see above."""
    texts = {
        "workdir": "Answer with its newest checkpoint.",
        "model": "Answer with this Hugging Face folder or workdir instead.",
        "prompt": "A prompt.",
        "file": "A file with a prompt, or with rows that have one each.",
        "system": "A system message, for prompts that have none.",
        "num_samples": "Answers to each prompt, 1 by default.",
        "max_new_tokens": f"Of an answer, at most; by default {MAX_NEW_TOKENS}, or as many as "
        "the model has positions for.",
        "temperature": f"{TEMPERATURE} by default; 0: always the most probable token.",
        "top_p": f"The most probable tokens whose mass reaches it, {TOP_P} by default.",
        "top_k": "The most probable tokens, so many of them; 0, the default: all.",
        "seed": "Of the samples, 0 by default.",
        "dtype": "float32 (default on CPU) or bfloat16 (default elsewhere).",
    }
    switches = {"raw": "Continue the text itself, without the chat template."}
    flags = config.parse_flags(
        argv, __doc__, texts, switches=switches, with_config=False
    )
    try:
        run(flags)
    except KeyboardInterrupt:
        if sys.stdout.isatty():
            print(PLAIN)
        sys.exit(130)  # As a shell says that SIGINT ended it.
    except BrokenPipeError:  # Who reads has read enough. Python would flush once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # As for SIGPIPE.


def run(flags: types.SimpleNamespace) -> None:
    """Answers what the flags ask; whatever does not fit is found before weights are read."""
    if not (flags.workdir or flags.model) or (flags.workdir and flags.model):
        raise InputError("name the model by one of --workdir=DIR and --model=FOLDER")
    if flags.dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"--dtype must be float32 or bfloat16, not {flags.dtype!r}")
    path = flags.model or flags.workdir
    settings = read_settings(flags)
    hosts.join()
    tokenizer = tokens.load(checkpoint.model_folder(path))
    model = hf_weights.read_config(checkpoint.model_folder(path))
    tokens.check_fits(tokenizer, model.vocab_size)
    prompts = hosts.gather(read_given(flags) if hosts.first() else None)[0]
    groups = make_groups(prompts or [], tokenizer, model, settings)
    layout = make_layout(model)
    on_cpu = platform(layout) == "cpu"
    dtype = jnp.dtype(flags.dtype or ("float32" if on_cpu else "bfloat16"))
    params, _ = checkpoint.load_model(path, layout)

    def answer_all(prompts, groups):
        answer(params, model, prompts, groups, tokenizer, settings, dtype, layout)

    if prompts is not None:
        answer_all(prompts, groups)
        return
    for turn in itertools.count():
        line = hosts.gather(ask() if hosts.first() else None)[0]
        if not line:
            return
        prompts = [("the prompt", [{"role": "user", "content": line}])]
        try:
            answer_all(
                prompts, make_groups(prompts, tokenizer, model, settings, first_id=turn)
            )
        except InputError as error:  # The next line may be better.
            print(f"error: {error}", file=sys.stderr)


def read_settings(flags: types.SimpleNamespace) -> Settings:
    """The flags that are numbers and texts, checked."""

    number = functools.partial(config.number, flags)
    return Settings(
        sampling=Sampling(
            number("temperature", float, TEMPERATURE),
            number("top_p", float, TOP_P),
            number("top_k", int, 0),
        ),
        max_new_tokens=number("max_new_tokens", int, None),
        num_samples=number("num_samples", int, 1),
        seed=number("seed", int, 0),
        system=flags.system or "",
        raw=flags.raw,
    )


def read_given(flags: types.SimpleNamespace) -> list[Prompt] | None:
    """The prompts that the flags or a pipe give; None: a terminal is to be asked."""
    if flags.prompt is not None and flags.file is not None:
        raise InputError("give one of --prompt=TEXT and --file=FILE")
    if flags.prompt is not None:
        return [as_prompt("--prompt", os.fsencode(flags.prompt))]
    if flags.file is None:
        if sys.stdin.isatty():
            return None
        return [as_prompt("standard input", sys.stdin.buffer.read())]
    if flags.file.endswith(ROWS):
        prompts = [(where, said) for where, _, said in read_prompts(flags.file)]
        if not prompts:
            raise InputError(f"{flags.file} holds no prompt")
        return prompts
    try:
        return [as_prompt(flags.file, epath.Path(flags.file).read_bytes())]
    except OSError as error:
        raise InputError(f"--file={flags.file} cannot be read: {error}") from None


def as_prompt(where: str, data: bytes) -> Prompt:
    """A text as the message of a user; the end of its last line is none of it."""
    try:
        text = data.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is no text in UTF-8: {error}") from None
    if not text:
        raise InputError(f"{where} is empty: give a prompt")
    return where, [{"role": "user", "content": text}]


def ask() -> str:
    """A line of the terminal; '' at its end."""
    try:
        return input("> ")
    except EOFError:
        print()
        return ""


def make_groups(
    prompts: Sequence[Prompt],
    tokenizer: tokens.Tokenizer,
    model: qwen3.Config,
    settings: Settings,
    *,
    first_id: int = 0,
) -> list[sampler.Group]:
    """What the sampler shall draw.

    Args:
        first_id: of the prompts, in the random numbers.

    Raises:
        InputError: a prompt that leaves the answer too little room, or, with `raw`, is no
            single text.
    """
    key = jax.random.key(settings.seed)
    groups = []
    for i, (where, messages) in enumerate(prompts):
        ids = _prompt_ids(where, messages, tokenizer, settings)
        room = model.max_positions - len(ids)
        if room < 1:
            raise InputError(
                f"{where} has {len(ids)} tokens, and the model {model.max_positions} "
                "positions for prompt and answer: shorten it"
            )
        limit = settings.max_new_tokens or min(MAX_NEW_TOKENS, room)
        if limit > room:
            raise InputError(
                f"{where} has {len(ids)} tokens, and the model {model.max_positions} "
                f"positions: --max_new_tokens can be at most {room}, not {limit}"
            )
        begun = [sampler.NOT_BEGUN] * settings.num_samples
        groups.append(sampler.Group(ids, first_id + i, key, limit, begun))
    return groups


def _prompt_ids(
    where: str,
    messages: Sequence[dict[str, str]],
    tokenizer: tokens.Tokenizer,
    settings: Settings,
) -> list[int]:
    if settings.raw:
        if len(messages) > 1:
            raise InputError(
                f"{where} has {len(messages)} messages: --raw continues a single text"
            )
        return tokenizer.encode(messages[0]["content"])
    if settings.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": settings.system}, *messages]
    return tokenizer.prompt(messages)


def make_layout(model: qwen3.Config) -> Layout:
    """All devices: those that can share the weights do, and such groups share the samples."""
    count = len(jax.devices())
    tensor = math.gcd(count, model.num_kv_heads, model.mlp_width, model.vocab_size)
    mesh = MeshConfig(data=-1, fsdp=1, tensor=tensor, rules=RULES)
    return Layout(make_mesh(mesh), mesh.rules)


def answer(
    params: qwen3.Params,
    model: qwen3.Config,
    prompts: Sequence[Prompt],
    groups: Sequence[sampler.Group],
    tokenizer: tokens.Tokenizer,
    settings: Settings,
    dtype: jnp.dtype,
    layout: Layout,
) -> list[sampler.Group]:
    """Samples the groups, and prints them as they come; of several processes, the first."""
    printer = Printer(prompts, groups, tokenizer, sys.stdout) if hosts.first() else None
    found, _ = sampler.sample_groups(
        params,
        model,
        groups,
        sampling=settings.sampling,
        engine=sampler.Engine(
            num_slots=NUM_SLOTS * layout.shards("batch"), decode_steps=DECODE_STEPS
        ),
        stop_ids=tokenizer.stop_ids,
        dtype=dtype,
        layout=layout,
        on_tokens=printer.on_tokens if printer else None,
        on_finish=printer.on_finish if printer else None,
    )
    if printer:
        print(printer.summary(found), file=sys.stderr)
    return found


class Printer:
    """Prints samples one after the other: the one in front as its tokens come, while those
    of the others wait."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        groups: Sequence[sampler.Group],
        tokenizer: tokens.Tokenizer,
        out: TextIO,
    ):
        self._prompts, self._groups = prompts, groups
        self._tokenizer, self._out = tokenizer, out
        self._left = collections.deque(
            (i, j) for i, group in enumerate(groups) for j in range(len(group.samples))
        )
        self._several = len(self._left) > 1
        self._waiting: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
        self._ended: set[tuple[int, int]] = set()
        # Of the one in front, once it is begun.
        self._text: tokens.Stream | None = None
        self._start = time.perf_counter()
        self._first: tuple[float, int] | None = None  # When, and how many, tokens came.

    def on_tokens(self, i: int, j: int, ids: list[int]) -> None:
        self._first = self._first or (time.perf_counter(), len(ids))
        self._waiting[i, j] += [x for x in ids if x not in self._tokenizer.stop_ids]
        self._print()

    def on_finish(self, i: int, j: int, sample: sampler.Sample) -> None:
        self._ended.add((i, j))
        self._print()

    def _print(self) -> None:
        while self._left:
            name = self._left[0]
            text = self._text or self._begin(*name)
            self._write(text.add(self._waiting.pop(name, [])))
            if name not in self._ended:
                break
            self._write(text.end())
            self._out.write(self._look.end() + "\n")
            self._left.popleft()
            self._text = None
        self._out.flush()

    def _begin(self, i: int, j: int) -> tokens.Stream:
        self._text = tokens.Stream(self._tokenizer)
        told = self._tokenizer.decode(self._groups[i].prompt)
        self._look = Look(
            terminal=self._out.isatty(), thinking=told.rstrip().endswith(THINK[0])
        )
        if self._several:
            title = [self._prompts[i][0]] if len(self._groups) > 1 else []
            if len(self._groups[i].samples) > 1:
                title.append(f"sample {j + 1} of {len(self._groups[i].samples)}")
            self._out.write(f"--- {', '.join(title)} ---\n")
        return self._text

    def _write(self, text: str) -> None:
        self._out.write(self._look.add(text))

    def summary(self, groups: Sequence[sampler.Group]) -> str:
        """Tokens, their speed once they came, and how many samples came to their end."""
        now = time.perf_counter()
        samples = [sample for group in groups for sample in group.samples]
        total = sum(len(sample.tokens) for sample in samples)
        cut = sum(not sample.finished for sample in samples)
        limits = {group.limit for group in groups}
        end = f"all {len(samples)} samples finished" if self._several else "finished"
        if cut:
            what = f"{cut} of {len(samples)} samples " if self._several else ""
            limit = f"={limits.pop()}" if len(limits) == 1 else ""
            end = f"{what}cut off by max_new_tokens{limit}"
        assert self._first is not None  # A sample has a token.
        when, count = self._first
        speed = f", then {(total - count) / (now - when):.1f} tokens/s"
        return (
            f"{total} tokens, {end}; the first after {when - self._start:.1f} s"
            f"{speed if total > count else ''}"
        )


class Look:
    """How text looks as it comes: on a terminal, thoughts are dimmed, and what would steer
    the terminal is written out."""

    def __init__(self, *, terminal: bool, thinking: bool):
        """
        Args:
            thinking: the text begins within <think> tags.
        """
        self._terminal, self._thinking = terminal, thinking
        self._shown = ""  # What is shown before the next text.
        self._held = ""  # What may be the beginning of a tag.
        if terminal and thinking:
            self._shown = DIM

    def add(self, text: str) -> str:
        """The text as far as it can be shown now."""
        if not self._terminal:
            return text
        shown, text = self._shown, self._held + text
        while (tag := THINK[self._thinking]) in text:
            before, _, text = text.partition(tag)
            shown += _harmless(before)
            shown += tag + PLAIN if self._thinking else DIM + tag
            self._thinking = not self._thinking
        held = max(n for n in range(len(tag)) if text.endswith(tag[:n]))
        self._shown, self._held = "", text[len(text) - held :]
        return shown + _harmless(text[: len(text) - held])

    def end(self) -> str:
        """What was held back, and the end of a thought that was cut off."""
        return self._held + (PLAIN if self._terminal and self._thinking else "")


def _harmless(text: str) -> str:
    return "".join(
        ascii(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c
        for c in text
    )


if __name__ == "__main__":
    config.run_main(main)
