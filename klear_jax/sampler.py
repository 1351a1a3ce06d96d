"""The sampler: prompts in, samples with their log-probabilities out; token ids, no text.

It runs the trainer's own layer on the trainer's own parameters. The random number behind
a token is a pure function of (seed, prompt, sample, position), so that a sample does not
depend on its slot, its batch mates or the order of requests.

Shape letters: B slots, P prompt tokens, T response tokens, V vocabulary, D width.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from klear_jax import kv_cache, qwen3
from klear_jax.errors import InputError

CDF_BLOCK = 128  # Tokens summed together in the two-level inverse of the distribution.


@dataclasses.dataclass(frozen=True)
class Sample:
    """One response to one prompt."""

    tokens: list[int]  # With the stop token, if one came.
    logprobs: np.ndarray  # [n] float32: log_softmax at temperature 1, untruncated.
    finished: bool  # A stop token came before the limit.


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Order: temperature, top-k, top-p."""

    temperature: float = 1.0  # 0: the most probable token.
    top_p: float = 1.0  # The most probable tokens whose mass reaches it; 1: all.
    top_k: int = 0  # The k most probable tokens; 0: all. Ties with the last one stay.

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise InputError(
                f"temperature must be 0 (greedy) or more, not {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], not {self.top_p}")
        if not self.top_k >= 0:
            raise InputError(f"top_k must be 0 (off) or more, not {self.top_k}")


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
    stop_ids: Sequence[int] = (),
    seed: int | jax.Array = 0,
    prompt_ids: Sequence[int] | None = None,
    num_slots: int = 256,
    dtype: jnp.dtype | None = None,
    on_wave: Callable[[list[tuple[int, int, Sample]]], None] | None = None,
) -> list[list[Sample]]:
    """Samples `num_samples` responses to each prompt.

    Args:
        prompts: token ids; none may be empty.
        max_new_tokens: the limit of a response in tokens, or one limit a prompt.
        temperature, top_p, top_k: see `Sampling`. The log-probs returned are those of
            the whole distribution at temperature 1, whatever these are: a ratio of
            truncated ones would be biased by the mass cut off.
        stop_ids: token ids that end a response, and belong to it.
        seed: an integer, or a typed key.
        prompt_ids: what identifies each prompt in the random numbers, int32; default:
            its index.
        num_slots: sequences decoded at once.
        dtype: of activations and cache; None: the parameters' own.
        on_wave: called with (prompt index, sample index, Sample) of the samples just
            finished, while the next ones are computed.

    Returns:
        For each prompt, its samples.
    """
    limits = _check(prompts, config, max_new_tokens, num_samples, stop_ids, prompt_ids)
    if num_slots < 1:
        raise InputError(f"num_slots must be at least 1, not {num_slots}")
    sampling = Sampling(temperature, top_p, top_k)
    key = jax.random.key(seed) if isinstance(seed, int | np.integer) else seed
    prompt_ids = range(len(prompts)) if prompt_ids is None else prompt_ids
    requests = list(itertools.product(range(len(prompts)), range(num_samples)))
    num_slots = min(num_slots, _bucket(max(len(requests), 1), smallest=1))
    totals = [len(p) + n for p, n in zip(prompts, limits, strict=True)]
    prompt_tokens = _bucket(max(map(len, prompts), default=1))
    shape = Shape(
        slots=num_slots,
        prompt_tokens=prompt_tokens,
        new_tokens=_bucket(max(limits, default=1), parts=16),
        # 36,864 tokens are not given room for 65,536.
        capacity=max(prompt_tokens, _bucket(max(totals, default=1), parts=16)),
    )

    samples: list[list[Sample]] = [[None] * num_samples for _ in prompts]

    def collect(wave, state):
        state = jax.device_get(state)
        finished = []
        for slot, (i, j) in enumerate(wave):
            n = state.count_B[slot]
            samples[i][j] = Sample(
                tokens=state.tokens_BT[slot, :n].tolist(),
                logprobs=state.logprobs_BT[slot, :n].copy(),  # Lets go of the rest.
                finished=bool(state.stopped_B[slot]),
            )
            finished.append((i, j, samples[i][j]))
        if on_wave is not None:
            on_wave(finished)

    running = None
    for start in range(0, len(requests), num_slots):
        wave = requests[start : start + num_slots]
        state = _run_wave(
            params,
            **_wave_inputs(wave, prompts, limits, prompt_ids, shape),
            key=key,
            stop_ids=jnp.asarray(stop_ids, jnp.int32),
            config=config,
            sampling=sampling,
            shape=shape,
            dtype=dtype,
        )
        if running is not None:  # The device is busy with the next wave meanwhile.
            collect(*running)
        running = (wave, state)
    if running is not None:
        collect(*running)
    return samples


def _check(prompts, config, max_new_tokens, num_samples, stop_ids, prompt_ids):
    """The limit of each prompt; an InputError for what cannot be sampled."""
    limits = max_new_tokens
    if isinstance(limits, int | np.integer):
        limits = [int(limits)] * len(prompts)
    if len(limits) != len(prompts):
        raise InputError(
            f"max_new_tokens has {len(limits)} limits for {len(prompts)} prompts"
        )
    if num_samples < 1:
        raise InputError(f"num_samples must be at least 1, not {num_samples}")
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not len(prompt):
            raise InputError(f"prompt {i} is empty: a sample needs a token to continue")
        if limit < 1:
            raise InputError(
                f"max_new_tokens of prompt {i} must be at least 1, not {limit}"
            )
    for what, ids in (("stop id", stop_ids), *(("prompt token", p) for p in prompts)):
        if outside := [int(t) for t in ids if not 0 <= t < config.vocab_size]:
            raise InputError(
                f"{what} {outside[0]} is not in the vocabulary of {config.vocab_size}"
            )
    if prompt_ids is not None:
        if len(prompt_ids) != len(prompts):
            raise InputError(f"{len(prompt_ids)} prompt_ids for {len(prompts)} prompts")
        if len(set(map(int, prompt_ids))) != len(prompts):
            raise InputError(
                "prompt_ids repeat: two prompts would share their random numbers"
            )
        if outside := [i for i in map(int, prompt_ids) if not -(2**31) <= i < 2**31]:
            raise InputError(f"prompt_ids are int32: {outside[0]} is not")
    return limits


def _bucket(size: int, *, smallest: int = 16, parts: int = 1) -> int:
    """The next of `parts` equal steps up to the next power of two, so that few shapes are
    ever compiled."""
    grain = max(smallest, (1 << (size - 1).bit_length()) // parts)
    return -(-size // grain) * grain


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a compiled program is for."""

    slots: int
    prompt_tokens: int  # Room for a prompt.
    new_tokens: int  # Room for a response.
    capacity: int  # Room for a prompt with its response.


def _wave_inputs(wave, prompts, limits, prompt_ids, shape):
    """Host arrays of one wave; slots without a request have a limit of 0."""
    tokens_BP = np.zeros((shape.slots, shape.prompt_tokens), np.int32)
    length_B = np.ones(shape.slots, np.int32)
    limit_B = np.zeros(shape.slots, np.int32)
    identity_B2 = np.zeros((shape.slots, 2), np.int32)
    for slot, (i, j) in enumerate(wave):
        tokens_BP[slot, : len(prompts[i])] = prompts[i]
        length_B[slot] = len(prompts[i])
        limit_B[slot] = limits[i]
        identity_B2[slot] = prompt_ids[i], j
    return {
        "tokens_BP": tokens_BP,
        "length_B": length_B,
        "limit_B": limit_B,
        "identity_B2": identity_B2,
    }


@flax.struct.dataclass
class SamplerState:
    """What a decoding step reads and writes."""

    cache: kv_cache.Cache
    logits_BV: jax.Array  # Of the token to be drawn next.
    length_B: jax.Array  # Tokens in the cache.
    count_B: jax.Array  # Tokens drawn.
    stopped_B: jax.Array  # A stop token was drawn.
    tokens_BT: jax.Array
    logprobs_BT: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "sampling", "shape", "dtype"))
def _run_wave(
    params,
    tokens_BP,
    length_B,
    limit_B,
    identity_B2,
    key,
    stop_ids,
    *,
    config: qwen3.Config,
    sampling: Sampling,
    shape: Shape,
    dtype,
) -> SamplerState:
    """Prefill, then decoding until every slot has stopped or met its limit."""
    key_B = jax.vmap(
        lambda identity: jax.random.fold_in(
            jax.random.fold_in(key, identity[0]), identity[1]
        )
    )(identity_B2)
    state = _prefill(params, config, tokens_BP, length_B, shape, dtype)

    def running(state):
        return jnp.any(~state.stopped_B & (state.count_B < limit_B))

    def step(state):
        return _decode_step(
            params, config, sampling, state, key_B, limit_B, stop_ids, dtype
        )

    state = jax.lax.while_loop(running, step, state)
    return state.replace(cache=None, logits_BV=None)


def _prefill(params, config, tokens_BP, length_B, shape, dtype):
    B, P = tokens_BP.shape
    real_BP = (jnp.arange(P)[None] < length_B[:, None]).astype(jnp.int32)
    hidden_BPD, (k_LBPKH, v_LBPKH) = qwen3.forward(
        params, config, tokens_BP, segment_ids_BT=real_BP, dtype=dtype, return_kv=True
    )
    last_BD = jnp.take_along_axis(hidden_BPD, (length_B - 1)[:, None, None], axis=1)[
        :, 0
    ]
    return SamplerState(
        cache=kv_cache.from_prefill(k_LBPKH, v_LBPKH, shape.capacity),
        logits_BV=_logits(params, last_BD),
        length_B=length_B,
        count_B=jnp.zeros(B, jnp.int32),
        stopped_B=jnp.zeros(B, bool),
        tokens_BT=jnp.zeros((B, shape.new_tokens), jnp.int32),
        logprobs_BT=jnp.zeros((B, shape.new_tokens), jnp.float32),
    )


def _logits(params, hidden_BD):
    head_VD = qwen3.head_weight(params).astype(hidden_BD.dtype)
    return jnp.einsum(
        "BD,VD->BV", hidden_BD, head_VD, preferred_element_type=jnp.float32
    )


def _decode_step(params, config, sampling, state, key_B, limit_B, stop_ids, dtype):
    """Draws a token a slot, and computes the logits of the next. Slots that are done
    compute along, and change nothing."""
    active_B = ~state.stopped_B & (state.count_B < limit_B)
    token_B = choose(
        state.logits_BV, jax.vmap(jax.random.fold_in)(key_B, state.count_B), sampling
    )
    logprob_BV = jax.nn.log_softmax(state.logits_BV)
    logprob_B = jnp.take_along_axis(logprob_BV, token_B[:, None], axis=1)[:, 0]

    slot_B = jnp.arange(len(token_B))
    where_B = jnp.where(
        active_B, state.count_B, state.tokens_BT.shape[1]
    )  # Beyond: dropped.
    attends = [
        functools.partial(kv_cache.append_and_attend, k, v, state.length_B)
        for k, v in zip(state.cache.k, state.cache.v, strict=True)
    ]
    hidden_BD, kept = qwen3.decode(
        params, config, token_B, state.length_B, attends, dtype=dtype
    )
    return SamplerState(
        cache=kv_cache.Cache(k=tuple(k for k, _ in kept), v=tuple(v for _, v in kept)),
        logits_BV=_logits(params, hidden_BD),
        length_B=state.length_B + active_B,
        count_B=state.count_B + active_B,
        stopped_B=state.stopped_B | (active_B & jnp.isin(token_B, stop_ids)),
        tokens_BT=state.tokens_BT.at[slot_B, where_B].set(token_B, mode="drop"),
        logprobs_BT=state.logprobs_BT.at[slot_B, where_B].set(logprob_B, mode="drop"),
    )


def choose(logits_BV: jax.Array, key_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws a token from each row of float32 logits, [B] int32, without sorting."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # The maximum goes first, so that no temperature makes inf - inf. Unnormalised.
    below_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    prob_BV = jnp.exp(below_BV / sampling.temperature)
    if 0 < sampling.top_k < prob_BV.shape[-1]:
        prob_BV = _keep_largest(
            prob_BV, lambda keep_BV: keep_BV.sum(axis=-1) >= sampling.top_k
        )
    if sampling.top_p < 1:
        need_B = sampling.top_p * prob_BV.sum(axis=-1)
        prob_BV = _keep_largest(
            prob_BV, lambda keep_BV: jnp.sum(prob_BV, axis=-1, where=keep_BV) >= need_B
        )
    uniform_B = jax.vmap(jax.random.uniform)(key_B)
    return _invert_cdf(prob_BV, uniform_B)


def _keep_largest(prob_BV: jax.Array, enough) -> jax.Array:
    """Zeroes all but the fewest largest entries that are `enough` (ties stay together).

    Floats of one sign order like their bits: the threshold is found bit by bit, exactly,
    in 31 passes over the row whatever its length.
    """
    bits_BV = jax.lax.bitcast_convert_type(prob_BV, jnp.int32)

    def try_bit(i, threshold_B):
        higher_B = threshold_B | (1 << (30 - i))
        return jnp.where(enough(bits_BV >= higher_B[:, None]), higher_B, threshold_B)

    threshold_B = jax.lax.fori_loop(0, 31, try_bit, jnp.zeros(len(prob_BV), jnp.int32))
    return jnp.where(bits_BV >= threshold_B[:, None], prob_BV, 0.0)


def _invert_cdf(prob_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The token at which the running sum of a row first exceeds uniform x total.

    Summed in two levels, so that a long row loses no precision. A token of probability
    zero is never drawn, whatever the rounding.
    """
    B, V = prob_BV.shape
    prob_BXC = jnp.pad(prob_BV, [(0, 0), (0, -V % CDF_BLOCK)]).reshape(B, -1, CDF_BLOCK)
    mass_BX = prob_BXC.sum(axis=-1)
    sum_BX = jnp.cumsum(mass_BX, axis=-1)
    need_B = uniform_B * sum_BX[:, -1]
    block_B = _first_above(sum_BX, mass_BX, need_B)
    before_B = jnp.take_along_axis(sum_BX - mass_BX, block_B[:, None], axis=1)[:, 0]
    prob_BC = jnp.take_along_axis(prob_BXC, block_B[:, None, None], axis=1)[:, 0]
    sum_BC = before_B[:, None] + jnp.cumsum(prob_BC, axis=-1)
    return (block_B * CDF_BLOCK + _first_above(sum_BC, prob_BC, need_B)).astype(
        jnp.int32
    )


def _first_above(sum_BC, prob_BC, need_B):
    """The first positive entry whose running sum exceeds `need`, else the last positive."""
    found_BC = (sum_BC > need_B[:, None]) & (prob_BC > 0)
    last_B = prob_BC.shape[-1] - 1 - jnp.argmax(prob_BC[:, ::-1] > 0, axis=-1)
    return jnp.where(found_BC.any(axis=-1), jnp.argmax(found_BC, axis=-1), last_B)
