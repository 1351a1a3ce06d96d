"""The sampler: prompts in, samples with their log-probabilities out; token ids, no text.

It runs the trainer's own layer on the trainer's own parameters, over a paged cache, and
refills a slot as soon as its sample has ended. The random number behind a token is a pure
function of (seed, prompt, sample, position), so that a sample does not depend on its slot,
its batch mates, the order of requests or on what was preempted.

    groups -> scheduler -> decoding (device) -> scheduler -> samples

A device works on one call while the host prepares the next: `run` reads the results of a
call only when its successor is under way (but on CPU, where host and device are one).
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from klear_jax import decoding, qwen3, scheduler
from klear_jax.errors import InputError
from klear_jax.sampling import Sampling
from klear_jax.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Sample:
    """One response to one prompt."""

    tokens: list[int]  # With the stop token, if one came.
    logprobs: np.ndarray  # [n] float32: log_softmax at temperature 1, untruncated.
    finished: bool  # A stop token came before the limit.


NOT_BEGUN = Sample([], np.zeros(0, np.float32), False)


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt and its samples, as far as they have come."""

    prompt: Sequence[int]
    prompt_id: int  # What identifies it in the random numbers, int32.
    key: jax.Array  # A typed key: what `seed` is to `generate`.
    limit: int  # Tokens of a response.
    samples: Sequence[Sample]

    def ended(self, sample: Sample) -> bool:
        return sample.finished or len(sample.tokens) >= self.limit


@dataclasses.dataclass(frozen=True)
class Engine:
    """How the sampler works. What it draws does not depend on it, but for the last bits of
    log-probs (and so, once in a long while, a token), which depend on the sizes of the
    programs: num_slots, page_tokens and slot_tokens."""

    num_slots: int = 256  # Samples decoded at once, over all devices.
    page_tokens: int = 64  # Tokens of a page of the cache.
    pool_tokens: int | None = None  # Of the cache, all devices; None: what slots need.
    prefill_tokens: int = 256  # Of one prefill, on each replica.
    decode_steps: int = 8  # Between two words with the host.

    def __post_init__(self):
        for name in ("num_slots", "page_tokens", "prefill_tokens", "decode_steps"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"{name} must be at least 1, not {getattr(self, name)}"
                )
        if self.pool_tokens is not None and self.pool_tokens < self.page_tokens:
            raise InputError(
                f"pool_tokens ({self.pool_tokens}) must hold at least one page of "
                f"page_tokens ({self.page_tokens})"
            )


def generate(
    params: qwen3.Params,
    config: qwen3.Config,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    num_samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop_ids: Sequence[int] = (),
    seed: int | jax.Array = 0,
    prompt_ids: Sequence[int] | None = None,
    dtype: jnp.dtype | None = None,
    layout: Layout | None = None,
    on_finish: Callable[[int, int, Sample], None] | None = None,
    on_tokens: Callable[[int, int, list[int]], None] | None = None,
    share_prompts: bool = True,
    **engine: Any,
) -> list[list[Sample]]:
    """Samples `num_samples` responses to each prompt.

    Args:
        prompts: token ids; none may be empty.
        max_new_tokens: the limit of a response in tokens, or one limit a prompt.
        temperature, top_p, top_k, repetition_penalty: see `Sampling`. The log-probs
            returned are those of the whole distribution at temperature 1, whatever these
            are: a ratio of truncated ones would be biased by the mass cut off.
        stop_ids: token ids that end a response, and belong to it.
        seed: an integer, or a typed key.
        prompt_ids: what identifies each prompt in the random numbers, int32; default:
            its index.
        dtype: of activations and cache; None: the parameters' own.
        layout: of the parameters, where they lie on a mesh: slots then lie on its batch
            axes, heads on its tensor axis.
        on_finish: called with (prompt index, sample index, Sample) as samples end.
        on_tokens: called with (prompt index, sample index, tokens) as tokens come: each
            token once, in order, before its sample's on_finish.
        share_prompts: a prompt is computed once for all its samples.
        **engine: see `Engine`.

    Returns:
        For each prompt, its samples.
    """
    limits = max_new_tokens
    if isinstance(limits, int | np.integer):
        limits = [int(limits)] * len(prompts)
    if len(limits) != len(prompts):
        raise InputError(
            f"max_new_tokens has {len(limits)} limits for {len(prompts)} prompts"
        )
    if num_samples < 1:
        raise InputError(f"num_samples must be at least 1, not {num_samples}")
    prompt_ids = range(len(prompts)) if prompt_ids is None else prompt_ids
    if len(prompt_ids) != len(prompts):
        raise InputError(f"{len(prompt_ids)} prompt_ids for {len(prompts)} prompts")
    key = jax.random.key(seed) if isinstance(seed, int | np.integer) else seed
    groups, _ = sample_groups(
        params,
        config,
        [
            Group(prompt, int(name), key, int(limit), [NOT_BEGUN] * num_samples)
            for prompt, name, limit in zip(prompts, prompt_ids, limits, strict=True)
        ],
        sampling=Sampling(temperature, top_p, top_k, repetition_penalty),
        engine=Engine(**engine),
        stop_ids=stop_ids,
        dtype=dtype,
        layout=layout,
        on_finish=on_finish,
        on_tokens=on_tokens,
        share_prompts=share_prompts,
    )
    return [list(group.samples) for group in groups]


def sample_groups(
    params: qwen3.Params,
    config: qwen3.Config,
    groups: Sequence[Group],
    *,
    sampling: Sampling,
    engine: Engine,
    stop_ids: Sequence[int] = (),
    dtype: jnp.dtype | None = None,
    layout: Layout | None = None,
    on_finish: Callable[[int, int, Sample], None] | None = None,
    on_tokens: Callable[[int, int, list[int]], None] | None = None,
    enough: Callable[[], bool] | None = None,
    slot_tokens: int | None = None,
    share_prompts: bool = True,
) -> tuple[list[Group], dict[str, float]]:
    """Continues every sample that has not ended; see `generate`.

    Args:
        on_tokens: hears of the tokens that are drawn now, not of those that were there.
        slot_tokens: room of a sample with its prompt. It fixes the programs: this and the
            engine are then what is compiled, whatever is asked for. None: made to fit.
        enough: asked before each call; once true, no more is begun, and the samples are
            returned as far as they have come. It may depend on what `on_finish` has seen,
            but not on time: all processes must agree.

    Returns:
        The groups with their samples, and counts of the work (`Scheduler.stats`, with
        'reshard_bytes', 'reshard_seconds' and 'occupancy', the share of slots that drew a
        token, over all steps).
    """
    check_groups(groups, config, stop_ids)
    kernel = decoding.kernel_for(config, jax.default_backend())
    shape = program_shape(engine, layout, slot_tokens, groups, kernel=kernel)
    check_fits(groups, shape)
    start = time.perf_counter()
    programs = decoding.Programs(
        params,
        shape,
        sampling,
        stop_ids,
        config=config,
        layout=layout,
        dtype=dtype,
    )
    stats = {
        "reshard_bytes": programs.weight_bytes,
        "reshard_seconds": time.perf_counter() - start,
    }
    found = [list(group.samples) for group in groups]

    def finish(result: scheduler.Finished, *, ended: bool) -> None:
        i, j = result.request.name
        begun = groups[i].samples[j]
        found[i][j] = Sample(
            begun.tokens + result.tokens,
            np.concatenate([begun.logprobs, result.logprobs]),
            result.stopped,
        )
        if ended and on_finish is not None:
            on_finish(i, j, found[i][j])

    plan = scheduler.Scheduler(shape, _requests(groups, share_prompts), stop_ids)
    ahead = 0 if jax.default_backend() == "cpu" else 1
    on_read = on_tokens and _Telling(on_tokens)
    for result in run(plan, programs, enough, ahead=ahead, on_read=on_read):
        finish(result, ended=True)
    for result in plan.unfinished():
        finish(result, ended=False)
    stats |= plan.stats
    steps = plan.stats["decode_steps"] * shape.replicas * shape.slots
    stats["occupancy"] = plan.stats["slot_steps"] / max(steps, 1)
    return [
        dataclasses.replace(group, samples=samples)
        for group, samples in zip(groups, found, strict=True)
    ], stats


def warm_up(
    params: qwen3.Params,
    config: qwen3.Config,
    *,
    sampling: Sampling,
    engine: Engine,
    slot_tokens: int,
    stop_ids: Sequence[int],
    dtype: jnp.dtype | None = None,
    layout: Layout | None = None,
) -> None:
    """Compiles all programs that `sample_groups` with these arguments will ever use."""
    shape = program_shape(
        engine,
        layout,
        slot_tokens,
        kernel=decoding.kernel_for(config, jax.default_backend()),
    )
    decoding.Programs(
        params,
        shape,
        sampling,
        stop_ids,
        config=config,
        layout=layout,
        dtype=dtype,
    ).warm_up()


def run(
    plan: scheduler.Scheduler,
    programs: decoding.Programs,
    enough: Callable[[], bool] | None = None,
    *,
    ahead: int = 1,
    on_read: Callable[[scheduler.Decode], None] | None = None,
) -> Iterator[scheduler.Finished]:
    """Runs the plan; yields samples as they end, while the next steps are under way.

    Args:
        enough: see `sample_groups`.
        ahead: calls that are dispatched before the host reads the one in front of them:
            1 keeps a device busy that is not the host; 0 hears of stop tokens sooner.
        on_read: called with each call of decoding whose tokens its samples now have,
            before those of them that have ended are yielded.
    """
    under_way: collections.deque[tuple[scheduler.Decode, Any, Any]] = (
        collections.deque()
    )
    while True:
        prefill = batch = None
        if enough is None or not enough():
            while (prefill := plan.next_prefill()) is not None:
                programs.prefill(prefill)
                # Decoding waits for one prefill at most, but for as many as it takes
                # while many slots are empty: a step costs the same.
                if plan.nearly_full:
                    break
            batch = plan.next_decode()
        if batch is not None:
            under_way.append((batch, *programs.decode(batch)))
        if under_way and (batch is None or len(under_way) > ahead):
            batch, tokens_SRB, logprobs_SRB = under_way.popleft()
            finished = plan.read(
                batch, np.asarray(tokens_SRB), np.asarray(logprobs_SRB)
            )
            if on_read is not None:
                on_read(batch)
            yield from finished
        elif prefill is None and batch is None:
            return


class _Telling:
    """Tells of the tokens that a call of decoding has brought. A sample that was preempted
    draws the same tokens again, from its first: it has been told of once."""

    def __init__(self, on_tokens: Callable[[int, int, list[int]], None]):
        self._on_tokens = on_tokens
        self._told: collections.Counter[tuple[int, int]] = collections.Counter()

    def __call__(self, batch: scheduler.Decode) -> None:
        for _, slot, _ in batch.cells:
            i, j = slot.request.name
            if new := slot.tokens[self._told[i, j] :]:
                self._told[i, j] += len(new)
                self._on_tokens(i, j, new)


def check_groups(
    groups: Sequence[Group], config: qwen3.Config, stop_ids: Sequence[int]
) -> None:
    """Raises an InputError for what cannot be sampled."""

    def check_tokens(what: str, ids: Sequence[int]) -> None:
        found = np.asarray(ids)
        if found.size and found.dtype.kind not in "iu":
            raise InputError(f"{what}s must be integers, not such as {ids[0]!r}")
        outside = found[(found < 0) | (found >= config.vocab_size)]
        if outside.size:
            raise InputError(
                f"{what} {outside[0]} is not in the vocabulary of {config.vocab_size}"
            )

    check_tokens("stop id", stop_ids)
    seen: set[tuple[int, bytes]] = set()
    for i, (group, key) in enumerate(zip(groups, _key_words(groups), strict=True)):
        if not len(group.prompt):
            raise InputError(f"prompt {i} is empty: a sample needs a token to continue")
        if group.limit < 1:
            raise InputError(
                f"max_new_tokens of prompt {i} must be at least 1, not {group.limit}"
            )
        check_tokens("prompt token", group.prompt)
        if not -(2**31) <= group.prompt_id < 2**31:
            raise InputError(f"prompt_ids are int32: {group.prompt_id} is not")
        if key.shape != (2,):
            raise InputError("the seed must be an integer or a threefry2x32 key")
        name = group.prompt_id, key.tobytes()
        if name in seen:
            raise InputError(
                f"prompt_ids repeat ({group.prompt_id}): two prompts would share their "
                "random numbers"
            )
        seen.add(name)


def check_engine(
    engine: Engine, layout: Layout | None, slot_tokens: int | None
) -> None:
    """Raises an InputError if the slots cannot be split over the mesh, or the cache cannot
    hold a sample of `slot_tokens` (None: not asked)."""
    replicas, P = _replicas(layout), engine.page_tokens
    if layout is not None and engine.num_slots % replicas:
        raise InputError(
            f"num_slots={engine.num_slots} must be a multiple of the {replicas} shards of "
            f"a batch (mesh axes {layout.rules['batch']})"
        )
    if engine.pool_tokens is None or slot_tokens is None:
        return
    # A page more, for the copy of the prompt's last one.
    least = (-(-slot_tokens // P) + 1) * P * replicas
    if engine.pool_tokens < least:
        raise InputError(
            f"pool_tokens={engine.pool_tokens} cannot hold one row of {slot_tokens} tokens "
            f"on each of {replicas} replica(s) in pages of {P}: make it {least} or more"
        )


def _replicas(layout: Layout | None) -> int:
    return 1 if layout is None else layout.shards("batch")


def check_fits(groups: Sequence[Group], shape: scheduler.Shape) -> None:
    """Raises an InputError for a prompt whose sample no slot, or no pool, can hold."""
    P = shape.page_tokens
    for i, group in enumerate(groups):
        what = (
            f"prompt {i} of {len(group.prompt)} tokens with a response of {group.limit}"
        )
        need = shape.pages_for(len(group.prompt) + group.limit)
        if need > shape.slot_pages:
            raise InputError(
                f"{what} does not fit into slot_tokens={shape.slot_pages * P}"
            )
        # A page more, for the copy of the prompt's last one.
        if need + 1 > shape.pages:
            raise InputError(
                f"{what} needs {need + 1} pages of {P} tokens, and the cache has "
                f"{shape.pages} on each of {shape.replicas} replica(s): raise pool_tokens "
                f"to {(need + 1) * P * shape.replicas}"
            )


def _key_words(groups: Sequence[Group]) -> list[np.ndarray]:
    """The groups' keys on the host, [2] uint32 each; each key is read once."""
    keys = {id(group.key): group.key for group in groups}
    words = {name: np.asarray(jax.random.key_data(k)) for name, k in keys.items()}
    return [words[id(group.key)] for group in groups]


def _requests(groups: Sequence[Group], share_prompts: bool) -> list[scheduler.Prompt]:
    """The samples that have not ended, by what they have in common."""
    prompts: list[scheduler.Prompt] = []
    for i, (group, key) in enumerate(zip(groups, _key_words(groups), strict=True)):
        together: dict[Any, scheduler.Prompt] = {}
        for j, begun in enumerate(group.samples):
            if group.ended(begun):
                continue
            name = tuple(begun.tokens) if share_prompts else j
            if name not in together:
                tokens = np.array([*group.prompt, *begun.tokens], np.int32)
                together[name] = scheduler.Prompt(tokens, collections.deque())
            drawn = len(begun.tokens)
            who = np.array([group.prompt_id, j], np.int32).view(np.uint32)
            together[name].requests.append(
                scheduler.Request(
                    name=(i, j),
                    key=np.concatenate([key, who]),
                    limit=group.limit - drawn,
                    drawn=drawn,
                )
            )
        prompts += together.values()
    return prompts


def program_shape(
    engine: Engine,
    layout: Layout | None,
    slot_tokens: int | None,
    groups: Sequence[Group] = (),
    *,
    kernel: str,
) -> scheduler.Shape:
    """The sizes of the programs. With `slot_tokens` they are the engine's own; without,
    they fit the groups, in few steps, so that few are ever compiled."""
    check_engine(engine, layout, slot_tokens)
    replicas, P = _replicas(layout), engine.page_tokens
    # Small on CPU, where what fills a block up costs time.
    most = 128 if kernel == "tpu" else 16
    Q = max(n for n in range(1, min(P, most) + 1) if P % n == 0)
    slots = engine.num_slots // replicas
    if slot_tokens is not None:
        slot_pages = -(-slot_tokens // P)
    else:
        requests = sum(not g.ended(s) for g in groups for s in g.samples)
        slots = min(slots, _bucket(-(-requests // replicas)))
        longest = max((len(g.prompt) + g.limit for g in groups), default=1)
        slot_pages = _bucket(-(-longest // P), parts=16)
    pages = slots * slot_pages + 1
    if engine.pool_tokens is not None:
        pages = engine.pool_tokens // (P * replicas)
    return scheduler.Shape(
        replicas=replicas,
        slots=slots,
        pages=pages,
        page_tokens=P,
        slot_pages=slot_pages,
        prefill_blocks=-(-engine.prefill_tokens // Q),
        block_tokens=Q,
        decode_steps=engine.decode_steps,
    )


def _bucket(size: int, *, parts: int = 1) -> int:
    """The next of `parts` equal steps up to the next power of two."""
    grain = max(1, (1 << (max(size, 1) - 1).bit_length()) // parts)
    return max(1, -(-size // grain)) * grain
