"""The sampler: prompts in, samples with their log-probabilities out; token ids, no text.

It runs the trainer's own layer on the trainer's own parameters, over a paged cache, and
refills a slot as soon as its sample has ended. The random number behind a token is a pure
function of (seed, prompt, sample, position), so that a sample does not depend on its slot,
its batch mates, the order of requests or on what was preempted.

    groups -> scheduler -> prefill, decode (device) -> scheduler -> samples

A device works on one call while the host prepares the next: `run` reads the results of a
call only when its successor is under way (but on CPU, where host and device are one).

Shape letters: R replicas (shards of the slots over the batch axes of the mesh), B slots of
a replica, X blocks of Q tokens of a prefill, W waiting states, S steps, M pages of a slot,
V vocabulary, D width.
"""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from klear_jax import kv_cache, qwen3, scheduler
from klear_jax.attention import page_pairs
from klear_jax.errors import InputError
from klear_jax.sampling import Sampling, choose, penalise
from klear_jax.sharding import Layout, constrain, sampling_layout


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
    log-probs, which depend on num_slots, page_tokens and slot_tokens."""

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

    @property
    def block_tokens(self) -> int:
        """A prompt is computed in blocks of so many tokens: a divisor of the page, small
        on CPU, where what fills a block up costs time."""
        most = 128 if default_kernel() == "tpu" else 16
        return max(
            n
            for n in range(1, self.page_tokens + 1)
            if self.page_tokens % n == 0 and n <= most
        )


def default_kernel() -> str:
    """The kernel for this process's devices; see `kv_cache.KERNELS`."""
    return "tpu" if jax.default_backend() == "tpu" else "xla"


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
    enough: Callable[[], bool] | None = None,
    slot_tokens: int | None = None,
    share_prompts: bool = True,
) -> tuple[list[Group], dict[str, float]]:
    """Continues every sample that has not ended; see `generate`.

    Args:
        slot_tokens: room of a sample with its prompt. It fixes the programs: this and the
            engine are then what is compiled, whatever is asked for. None: made to fit.
        enough: asked after each call of decoding; once true, no more is begun, and the
            samples are returned as far as they have come. It may depend on what
            `on_finish` has seen, but not on time: all processes must agree.

    Returns:
        The groups with their samples, and counts of the work (`Scheduler.stats`, with
        'reshard_bytes', 'reshard_seconds' and 'occupancy', the share of slots that drew a
        token, over all steps).
    """
    check_groups(groups, config, stop_ids)
    shape = program_shape(engine, layout, slot_tokens, groups)
    check_fits(groups, shape)
    start = time.perf_counter()
    programs = Programs(
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
    for result in run(plan, programs, enough, ahead=ahead):
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
    Programs(
        params,
        program_shape(engine, layout, slot_tokens),
        sampling,
        stop_ids,
        config=config,
        layout=layout,
        dtype=dtype,
    ).warm_up()


def run(
    plan: scheduler.Scheduler,
    programs: "Programs",
    enough: Callable[[], bool] | None = None,
    *,
    ahead: int = 1,
) -> Iterator[scheduler.Finished]:
    """Runs the plan; yields samples as they end, while the next steps are under way.

    Args:
        enough: see `sample_groups`.
        ahead: calls that are dispatched before the host reads the one in front of them:
            1 keeps a device busy that is not the host; 0 hears of stop tokens sooner.
    """
    under_way: collections.deque[tuple[scheduler.Decode, Any, Any]] = (
        collections.deque()
    )
    while True:
        prefill = batch = None
        if enough is None or not enough():
            while (prefill := plan.next_prefill()) is not None:
                programs.prefill(prefill)
                # Decoding waits for one prefill at most; but filling slots comes first
                # while half of them are empty.
                if plan.half_full:
                    break
            batch = plan.next_decode()
        if batch is not None:
            under_way.append((batch, *programs.decode(batch)))
        if under_way and (batch is None or len(under_way) > ahead):
            batch, tokens_SRB, logprobs_SRB = under_way.popleft()
            yield from plan.read(
                batch, np.asarray(tokens_SRB), np.asarray(logprobs_SRB)
            )
        elif prefill is None and batch is None:
            return


def check_groups(
    groups: Sequence[Group], config: qwen3.Config, stop_ids: Sequence[int]
) -> None:
    """Raises an InputError for what cannot be sampled."""

    def check_tokens(what: str, ids: Sequence[int]) -> None:
        if outside := [int(t) for t in ids if not 0 <= t < config.vocab_size]:
            raise InputError(
                f"{what} {outside[0]} is not in the vocabulary of {config.vocab_size}"
            )

    check_tokens("stop id", stop_ids)
    seen: set[tuple[int, bytes]] = set()
    for i, group in enumerate(groups):
        if not len(group.prompt):
            raise InputError(f"prompt {i} is empty: a sample needs a token to continue")
        if group.limit < 1:
            raise InputError(
                f"max_new_tokens of prompt {i} must be at least 1, not {group.limit}"
            )
        check_tokens("prompt token", group.prompt)
        if not -(2**31) <= group.prompt_id < 2**31:
            raise InputError(f"prompt_ids are int32: {group.prompt_id} is not")
        name = group.prompt_id, _key_data(group.key).tobytes()
        if name in seen:
            raise InputError(
                f"prompt_ids repeat ({group.prompt_id}): two prompts would share their "
                "random numbers"
            )
        seen.add(name)


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


def _key_data(key: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(key))


def _requests(groups: Sequence[Group], share_prompts: bool) -> list[scheduler.Prompt]:
    """The samples that have not ended, by what they have in common."""
    prompts = []
    for i, group in enumerate(groups):
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
                    key=np.concatenate([_key_data(group.key), who]),
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
) -> scheduler.Shape:
    """The sizes of the programs. With `slot_tokens` they are the engine's own; without,
    they fit the groups, in few steps, so that few are ever compiled."""
    replicas = 1 if layout is None else layout.shards("batch")
    if engine.num_slots % replicas:
        raise InputError(
            f"num_slots={engine.num_slots} must be a multiple of the {replicas} shards of "
            f"a batch (mesh axes {layout.rules['batch']})"
        )
    P, Q = engine.page_tokens, engine.block_tokens
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


# --- device ---------------------------------------------------------------------------


@flax.struct.dataclass
class States:
    """Sequences whose next token is to be drawn; leading axes [R, B] or [R, W]."""

    hidden: jax.Array  # [.., D] of the last token, after the final norm.
    seen: jax.Array | None  # [.., V] bool, with a repetition penalty: tokens so far.


@flax.struct.dataclass
class Slots:
    """What decoding reads and writes, beside the cache."""

    states: States
    length_RB: jax.Array  # Tokens in the cache.
    count_RB: jax.Array  # Tokens of the response.
    stopped_RB: jax.Array


def pair_sizes(shape: scheduler.Shape) -> list[int]:
    """Sizes of XLA's list of (slot, page) pairs: a program each, from 64 up by 3/2, 4/3.

    Multiples of 32, for which results do not depend on the size: no vector is cut short.
    """
    most = -(-shape.slots * shape.slot_pages // 32) * 32
    steps = (size for n in range(6, 40) for size in (1 << n, 3 << (n - 1)))
    return [*itertools.takewhile(lambda size: size < most, steps), most]


class Programs:
    """The sampler's programs bound to weights, and the state that they hand on."""

    def __init__(
        self,
        params: qwen3.Params,
        shape: scheduler.Shape,
        sampling: Sampling,
        stop_ids: Sequence[int],
        *,
        config: qwen3.Config,
        layout: Layout | None,
        dtype: jnp.dtype | None,
    ):
        """Makes the sampling copy of the parameters, which stay as they are, an empty
        cache and empty slots. All of it goes when this object does."""
        self._jitted = jitted(jax.default_backend())
        self._static = {
            "config": config,
            "layout": layout and sampling_layout(layout),
            "dtype": params["embed"].dtype if dtype is None else jnp.dtype(dtype),
        }
        self._shape, self._sampling = shape, sampling
        kernel = default_kernel()
        self._pair_sizes = pair_sizes(shape) if kernel == "xla" else [0]
        # Padded, so that their number changes no program.
        self._stop_ids = np.full(-(-max(len(stop_ids), 1) // 8) * 8, -1, np.int32)
        self._stop_ids[: len(stop_ids)] = stop_ids
        self._weights = jax.block_until_ready(
            self._jitted.sampling_copy(params, kernel=kernel, **self._static)
        )
        self._pool, self._slots, self._waiting = self._jitted.init_state(
            shape=shape, kernel=kernel, sampling=sampling, **self._static
        )

    @property
    def weight_bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self._weights))

    def warm_up(self) -> None:
        """Runs every program once, on nothing."""
        self.prefill(scheduler.empty_prefill(self._shape))
        idle = scheduler.empty_decode(self._shape)
        self._copy_pages(idle.copies)
        for size in self._pair_sizes:
            self.decode(dataclasses.replace(idle, pairs=size))

    def prefill(self, batch: scheduler.Prefill) -> None:
        self._pool, self._waiting = self._jitted.prefill(
            self._weights, self._pool, self._waiting, vars(batch), **self._static
        )

    def decode(self, batch: scheduler.Decode) -> tuple[jax.Array, jax.Array]:
        """Copies pages, decodes; tokens and log-probs, [S, R, B] each, soon on the host."""
        if any(batch.copies):
            self._copy_pages(batch.copies)
        names = ("table", "limit", "key", "source", "start", "drawn")
        self._pool, self._slots, tokens_SRB, logprobs_SRB = self._jitted.decode(
            self._weights,
            self._pool,
            self._slots,
            self._waiting,
            {name: getattr(batch, name) for name in names},
            np.int32(batch.steps),
            self._stop_ids,
            sampling=self._sampling,
            max_steps=self._shape.decode_steps,
            num_pairs=min(n for n in self._pair_sizes if n >= batch.pairs or n == 0),
            **self._static,
        )
        tokens_SRB.copy_to_host_async()
        logprobs_SRB.copy_to_host_async()
        return tokens_SRB, logprobs_SRB

    def _copy_pages(self, copies: list[list[tuple[int, int]]]) -> None:
        """The lists have room for as many as slots can begin at once."""
        source_RB = np.zeros((self._shape.replicas, self._shape.slots), np.int32)
        target_RB = np.zeros_like(source_RB)
        for r, pairs in enumerate(copies):
            for b, (source, target) in enumerate(pairs):
                source_RB[r, b], target_RB[r, b] = source, target
        count_R = np.array(list(map(len, copies)), np.int32)
        self._pool = self._jitted.copy_pages(
            self._pool, source_RB, target_RB, count_R, layout=self._static["layout"]
        )


class Jitted(NamedTuple):
    """The device programs, compiled for a platform; their shapes are in `pair_sizes` and
    in `scheduler.Shape`."""

    sampling_copy: Callable[..., qwen3.Params]
    init_state: Callable[..., Any]
    prefill: Callable[..., Any]
    copy_pages: Callable[..., kv_cache.Pool]
    decode: Callable[..., Any]


def compiler_options(platform: str) -> dict[str, Any] | None:
    """On CPU, XLA may hand single dots to its library of kernels, but nothing around them:
    with more it splits the work by the size of the batch, and the bits of a sample depend
    on how many pages its mates have. It is no slower."""
    if platform != "cpu":
        return None
    return {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
    }


@functools.cache
def jitted(platform: str) -> Jitted:
    """jit, applied once, with the cache and the slots donated."""
    jit = functools.partial(jax.jit, compiler_options=compiler_options(platform))
    model = ("config", "layout", "dtype")
    return Jitted(
        jit(sampling_copy, static_argnames=(*model, "kernel")),
        jit(init_state, static_argnames=(*model, "sampling", "shape", "kernel")),
        jit(prefill, static_argnames=model, donate_argnames=("pool", "waiting")),
        jit(kv_cache.copy_pages, static_argnames="layout", donate_argnames="pool"),
        jit(
            decode,
            static_argnames=(*model, "sampling", "max_steps", "num_pairs"),
            donate_argnames=("pool", "slots"),
        ),
    )


def trace_programs(
    engine: Engine,
    slot_tokens: int,
    sampling: Sampling,
    *,
    config: qwen3.Config,
    layout: Layout | None,
    dtype: jnp.dtype,
    kernel: str,
    platform: str,
) -> dict[str, jax.stages.Traced]:
    """The programs of a run from shapes alone, ready to be lowered and compiled for devices
    that need not be there.

    Args:
        slot_tokens: see `sample_groups`.
        layout: of training, on the mesh to compile for.
        kernel: see `kv_cache.KERNELS`.
        platform: 'cpu', 'gpu' or 'tpu'.

    Returns:
        'reshard' (of float32 weights), 'prefill', 'copy_pages' and 'decode' (of the most
        pairs of slot and page).
    """
    shape = program_shape(engine, layout, slot_tokens)
    train_layout, layout = layout, layout and sampling_layout(layout)
    model = {"config": config, "layout": layout, "dtype": jnp.dtype(dtype)}
    programs = jitted(platform)

    def place(x, axes, layout=layout):
        axes = (*axes, *[None] * (x.ndim - len(axes)))
        sharding = layout and layout.sharding(*axes)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    table = qwen3.param_table(config)
    params = jax.tree.map(
        lambda param: place(
            jax.ShapeDtypeStruct(param.shape, jnp.float32), param.axes, train_layout
        ),
        table,
    )
    weights = jax.eval_shape(
        functools.partial(sampling_copy, kernel=kernel, **model), params
    )
    if kernel == "xla":
        layer = jax.tree.map(
            lambda p: dataclasses.replace(p, axes=p.axes[1:]), table["layers"]
        )
        table = table | {"layers": (layer,) * config.num_layers}
    weights = jax.tree.map(lambda p, x: place(x, p.axes), table, weights)
    init = functools.partial(
        init_state, shape=shape, kernel=kernel, sampling=sampling, **model
    )
    pool, slots, waiting = jax.eval_shape(init)
    pool = jax.tree.map(lambda x: place(x, pool.axes), pool)
    slots, waiting = jax.tree.map(lambda x: place(x, ("batch",)), (slots, waiting))

    s, int32 = shape, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    RX, RB = (s.replicas, s.prefill_blocks), (s.replicas, s.slots)
    blocks = {name: int32(RX) for name in ("start", "row", "last")} | {
        "tokens": int32((*RX, s.block_tokens)),
        "table": int32((*RX, s.slot_pages)),
        "active": jax.ShapeDtypeStruct(RX, bool),
    }
    steps = {name: int32(RB) for name in ("limit", "source", "start", "drawn")} | {
        "table": int32((*RB, s.slot_pages)),
        "key": jax.ShapeDtypeStruct((*RB, 4), jnp.uint32),
    }
    return {
        "reshard": programs.sampling_copy.trace(params, kernel=kernel, **model),
        "prefill": programs.prefill.trace(weights, pool, waiting, blocks, **model),
        "copy_pages": programs.copy_pages.trace(
            pool, int32(RB), int32(RB), int32(RB[:1]), layout=layout
        ),
        "decode": programs.decode.trace(
            weights,
            pool,
            slots,
            waiting,
            steps,
            int32(()),
            int32((8,)),
            sampling=sampling,
            max_steps=s.decode_steps,
            num_pairs=pair_sizes(s)[-1] if kernel == "xla" else 0,
            **model,
        ),
    }


def sampling_copy(
    params: qwen3.Params,
    *,
    config: qwen3.Config,
    layout: Layout | None,
    dtype: jnp.dtype,
    kernel: str,
) -> qwen3.Params:
    """The weights in the dtype and layout of sampling: cast and moved in one program."""

    def one(param, x):
        return constrain(x.astype(dtype), layout, *param.axes)

    copy = jax.tree.map(one, qwen3.param_table(config), params)
    return qwen3.unstack_layers(copy) if kernel == "xla" else copy


def init_state(
    *,
    config: qwen3.Config,
    sampling: Sampling,
    shape: scheduler.Shape,
    kernel: str,
    layout: Layout | None,
    dtype: jnp.dtype,
) -> tuple[kv_cache.Pool, Slots, States]:
    """An empty cache, empty slots, and no waiting prompts."""

    def states(rows):
        lead = shape.replicas, rows
        seen = jnp.zeros((*lead, config.vocab_size), bool)
        return States(
            hidden=jnp.zeros((*lead, config.width), dtype),
            seen=seen if sampling.penalises else None,
        )

    pool = kv_cache.empty_pool(
        config,
        kv_cache.PoolShape(shape.replicas, shape.pages, shape.page_tokens, kernel),
        dtype,
    )
    zeros_RB = jnp.zeros((shape.replicas, shape.slots), jnp.int32)
    slots = Slots(states(shape.slots), zeros_RB, zeros_RB, zeros_RB != 0)
    waiting = states(shape.waiting)
    return _place(pool, layout), _batch(slots, layout), _batch(waiting, layout)


def _place(pool, layout):
    return jax.tree.map(lambda x: constrain(x, layout, *pool.axes), pool)


def _batch(tree, layout):
    """Pins arrays whose first axis is the replica."""
    return jax.tree.map(
        lambda x: constrain(x, layout, "batch", *[None] * (x.ndim - 1)), tree
    )


def prefill(
    params: qwen3.Params,
    pool: kv_cache.Pool,
    waiting: States,
    batch: dict[str, jax.Array],
    *,
    config: qwen3.Config,
    layout: Layout | None,
    dtype: jnp.dtype,
) -> tuple[kv_cache.Pool, States]:
    """Computes blocks of prompts; the states of prompts that end among them.

    Args:
        batch: the arrays of a `scheduler.Prefill`.
    """
    batch = _batch(batch, layout)
    tokens_RXQ, row_RX, last_RX = batch["tokens"], batch["row"], batch["last"]
    R, X, Q = tokens_RXQ.shape
    rows = kv_cache.Rows(batch["table"], batch["start"], batch["active"], pairs=None)
    position_RXQ = batch["start"][..., None] + jnp.arange(Q)[None, None]
    rope = _rope_table(config, rows.table, pool)
    hidden_RTD, pool = qwen3.decode(
        params,
        config,
        tokens_RXQ.reshape(R, X * Q),
        [part[position_RXQ.reshape(R, X * Q)] for part in rope],
        functools.partial(_attend, rows, layout),
        pool,
        layout=layout,
        dtype=dtype,
    )
    hidden_RXQD = hidden_RTD.reshape(R, X, Q, -1)
    last_RXD = jnp.take_along_axis(
        hidden_RXQD, jnp.maximum(last_RX, 0)[..., None, None], axis=2
    )[:, :, 0]
    replica_R1 = jnp.arange(R)[:, None]
    nowhere = waiting.hidden.shape[1]
    ends_RX = jnp.where(last_RX >= 0, row_RX, nowhere)
    hidden = waiting.hidden.at[replica_R1, ends_RX].set(last_RXD, mode="drop")
    seen = waiting.seen
    if seen is not None:
        begins_RX = jnp.where(batch["start"] == 0, row_RX, nowhere)
        seen = seen.at[replica_R1, begins_RX].set(False, mode="drop")
        seen = seen.at[
            replica_R1[..., None],
            jnp.broadcast_to(row_RX[..., None], tokens_RXQ.shape),
            tokens_RXQ,
        ].set(True, mode="drop")
    return _place(pool, layout), _batch(States(hidden, seen), layout)


def _rope_table(config, table_RBM, pool):
    """cos and sin at every position of a slot, [M x P, H/2] each, to be looked up: XLA on
    CPU would compute them within every use, in every layer."""
    page_tokens = pool.k[0].shape[-1 if pool.v else 2]
    positions_1T = jnp.arange(table_RBM.shape[-1] * page_tokens)[None]
    return [part_1TH[0] for part_1TH in qwen3.rope_angles(config, positions_1T)]


def _attend(rows, layout, layer, pool, q, k, v):
    return kv_cache.append_and_attend(layer, pool, rows, q, k, v, layout=layout)


def decode(
    params: qwen3.Params,
    pool: kv_cache.Pool,
    slots: Slots,
    waiting: States,
    batch: dict[str, jax.Array],
    num_steps: jax.Array,
    stop_ids: jax.Array,
    *,
    config: qwen3.Config,
    sampling: Sampling,
    max_steps: int,
    num_pairs: int,
    layout: Layout | None,
    dtype: jnp.dtype,
) -> tuple[kv_cache.Pool, Slots, jax.Array, jax.Array]:
    """Draws `num_steps` tokens a slot; slots that are done compute along for nothing.

    Args:
        batch: arrays of a `scheduler.Decode`.
        num_pairs: of (slot, page) that XLA reads; 0 for the TPU kernel.

    Returns:
        Cache, slots, tokens_SRB, logprobs_SRB: S = max_steps, zeros beyond num_steps.
    """
    batch = _batch(batch, layout)
    slots = _begin(slots, waiting, batch)
    limit_RB, table_RBM = batch["limit"], batch["table"]
    key_RB = _sample_keys(batch["key"])
    rope = _rope_table(config, table_RBM, pool)
    pairs = None
    if num_pairs:
        P = pool.k[0].shape[-1]
        left_RB = jnp.where(slots.stopped_RB, 0, limit_RB - slots.count_RB)
        end_RB = slots.length_RB + jnp.minimum(left_RB, num_steps)
        pages_RB = jnp.where(left_RB > 0, -(-end_RB // P), 0)
        pairs = jax.vmap(lambda pages_B: page_pairs(pages_B, num_pairs))(pages_RB)

    def step(i, carry):
        pool, slots, tokens_SRB, logprobs_SRB = carry
        active_RB = ~slots.stopped_RB & (slots.count_RB < limit_RB)
        token_RB, logprob_RB = _draw(
            params,
            slots.states,
            jax.vmap(jax.vmap(jax.random.fold_in))(key_RB, slots.count_RB),
            sampling,
        )
        rows = kv_cache.Rows(table_RBM, slots.length_RB, active_RB, pairs)
        hidden_RBD, pool = qwen3.decode(
            params,
            config,
            token_RB,
            [part[slots.length_RB] for part in rope],
            functools.partial(_attend, rows, layout),
            pool,
            layout=layout,
            dtype=dtype,
        )
        seen = slots.states.seen
        if seen is not None:
            R, B, _ = seen.shape
            seen = seen.at[jnp.arange(R)[:, None], jnp.arange(B)[None], token_RB].set(
                True
            )
        slots = Slots(
            states=States(hidden_RBD, seen),
            length_RB=slots.length_RB + active_RB,
            count_RB=slots.count_RB + active_RB,
            stopped_RB=slots.stopped_RB | (active_RB & jnp.isin(token_RB, stop_ids)),
        )
        return (
            pool,
            slots,
            tokens_SRB.at[i].set(token_RB),
            logprobs_SRB.at[i].set(logprob_RB),
        )

    S_RB = (max_steps, *limit_RB.shape)
    carry = (pool, slots, jnp.zeros(S_RB, jnp.int32), jnp.zeros(S_RB, jnp.float32))
    pool, slots, *drawn = jax.lax.fori_loop(0, num_steps, step, carry)
    # Every process reads the whole of what was drawn.
    tokens_SRB, logprobs_SRB = (constrain(x, layout, None, None, None) for x in drawn)
    return _place(pool, layout), _batch(slots, layout), tokens_SRB, logprobs_SRB


def _begin(slots: Slots, waiting: States, batch: dict[str, jax.Array]) -> Slots:
    """The slots with new samples where `source` names a waiting state."""
    source_RB = batch["source"]
    new_RB = source_RB >= 0

    def take(old, waiting):
        row = jnp.take_along_axis(waiting, jnp.maximum(source_RB, 0)[..., None], axis=1)
        return jnp.where(new_RB[..., None], row, old)

    return Slots(
        states=jax.tree.map(take, slots.states, waiting),
        length_RB=jnp.where(new_RB, batch["start"], slots.length_RB),
        count_RB=jnp.where(new_RB, batch["drawn"], slots.count_RB),
        stopped_RB=slots.stopped_RB & ~new_RB,
    )


def _sample_keys(key_RB4: jax.Array) -> jax.Array:
    """The key of each sample: of the run or the step, the prompt and the sample."""

    def one(key_4):
        key = jax.random.wrap_key_data(key_4[:2])
        return jax.random.fold_in(jax.random.fold_in(key, key_4[2]), key_4[3])

    return jax.vmap(jax.vmap(one))(key_RB4)


def _draw(params, states, key_RB, sampling):
    """The next token of each slot and its log-prob in the whole distribution."""
    head_VD = qwen3.head_weight(params)
    R, B, D = states.hidden.shape
    logits_NV = jnp.einsum(
        "ND,VD->NV",
        states.hidden.reshape(R * B, D),
        head_VD,
        preferred_element_type=jnp.float32,
    )
    shown_NV = logits_NV
    if sampling.penalises:
        seen_NV = states.seen.reshape(logits_NV.shape)
        shown_NV = penalise(logits_NV, seen_NV, sampling.repetition_penalty)
    token_N = choose(shown_NV, key_RB.reshape(-1), sampling)
    logit_N = jnp.take_along_axis(logits_NV, token_N[:, None], axis=1)[:, 0]
    logprob_N = logit_N - jax.nn.logsumexp(logits_NV, axis=-1)
    return token_N.reshape(R, B), logprob_N.reshape(R, B)
