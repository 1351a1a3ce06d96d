"""The scheduler, run by the sampler's own loop on a machine of numpy that knows every token
of its cache: each step checks that a sample reads exactly its own past."""

import collections
import dataclasses
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from klear_jax import sampler, scheduler
from klear_jax.scheduler import Prompt, Request, Scheduler, Shape

STOP = 7


def drawn(key, position):
    """The token that sample `key` draws at a position, whatever else goes on."""
    return zlib.crc32(np.array([*key, position]).tobytes()) % 40


def whole(prompt, request):
    """The tokens of a request, and whether a stop token ends them."""
    out = []
    for n in range(request.limit):
        out.append(drawn(request.key, request.drawn + n))
        if out[-1] == STOP:
            return out, True
    return out, False


class Machine:
    """Does what the device programs do, on token ids in place of keys and values."""

    def __init__(self, shape):
        self.shape = shape
        R, B = shape.replicas, shape.slots
        self.pool = np.full((R, shape.pages, shape.page_tokens), -1)
        self.states = {}  # (replica, waiting row) -> tokens of the prompt.
        self.slots = [[None] * B for _ in range(R)]
        self.calls = []

    def past(self, r, table, length):
        return self.pool[r][table].reshape(-1)[:length].tolist()

    def prefill(self, batch):
        self.calls.append("prefill")
        s = self.shape
        for r, x in zip(*np.nonzero(batch.active), strict=True):
            start, table = batch.start[r, x], batch.table[r, x]
            assert start % s.block_tokens == 0
            for q, token in enumerate(batch.tokens[r, x]):
                place = start + q
                self.pool[r, table[place // s.page_tokens], place % s.page_tokens] = (
                    token
                )
            if (last := batch.last[r, x]) >= 0:
                self.states[r, batch.row[r, x]] = self.past(r, table, start + last + 1)

    def decode(self, batch):
        self.calls.append("decode")
        s = self.shape
        for r, copies in enumerate(batch.copies):
            for source, target in copies:
                self.pool[r, target] = self.pool[r, source]
        shape = (s.decode_steps, s.replicas, s.slots)
        tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        pairs = 0
        for r, b in np.ndindex(s.replicas, s.slots):
            table, key = batch.table[r, b], batch.key[r, b]
            if batch.source[r, b] >= 0:
                text = list(self.states[r, batch.source[r, b]])
                assert len(text) == batch.start[r, b]
                self.slots[r][b] = text, batch.drawn[r, b], False
            if not batch.limit[r, b]:
                continue
            text, count, stopped = self.slots[r][b]
            for step in range(batch.steps):
                if stopped or count >= batch.limit[r, b]:
                    break
                assert self.past(r, table, len(text)) == text
                token = drawn(key, count)
                page, offset = divmod(len(text), s.page_tokens)
                self.pool[r, table[page], offset] = token
                tokens[step, r, b], logprobs[step, r, b] = token, -token
                text.append(token)
                count, stopped = count + 1, token == STOP
            self.slots[r][b] = text, count, stopped
            pairs += -(-len(text) // s.page_tokens)
        assert pairs <= batch.pairs * s.replicas
        return tokens, logprobs


def prompts_of(lengths, groups, limits, begun):
    found = []
    for i, (length, samples, limit) in enumerate(
        zip(lengths, groups, limits, strict=True)
    ):
        tokens = np.arange(length) + 1000 * (i + 1)
        found.append(
            Prompt(
                tokens,
                collections.deque(
                    Request((i, j), np.array([0, 1, i, j], np.uint32), limit, begun)
                    for j in range(samples)
                ),
            )
        )
    return found


@st.composite
def workloads(draw):
    blocks = draw(st.sampled_from([1, 2, 4]))
    page = blocks * draw(st.sampled_from([1, 2, 4]))
    number = draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(1, 20), min_size=number, max_size=number))
    groups = draw(st.lists(st.integers(1, 5), min_size=number, max_size=number))
    limits = draw(st.lists(st.integers(1, 25), min_size=number, max_size=number))
    longest = max(a + b for a, b in zip(lengths, limits, strict=True))
    need = -(-longest // page) + 1
    shape = Shape(
        replicas=draw(st.integers(1, 3)),
        slots=draw(st.integers(1, 5)),
        pages=need + draw(st.integers(0, 2 * need)),
        page_tokens=page,
        slot_pages=need - 1,
        prefill_blocks=draw(st.integers(1, 4)),
        block_tokens=blocks,
        decode_steps=draw(st.integers(1, 6)),
    )
    return shape, prompts_of(lengths, groups, limits, draw(st.sampled_from([0, 3])))


@hypothesis.settings(max_examples=400)
@hypothesis.given(workloads(), st.integers(0, 2))
def test_every_sample_comes_once_and_is_its_own(workload, ahead):
    shape, prompts = workload
    want = {r.name: whole(p, r) for p in prompts for r in p.requests}
    plan = Scheduler(shape, prompts, [STOP])
    got = {}
    for result in sampler.run(plan, Machine(shape), ahead=ahead):
        assert result.request.name not in got
        got[result.request.name] = result.tokens, result.stopped
        assert (result.logprobs == -np.array(result.tokens)).all()
    assert got == want
    # Nothing is left behind, and what was shared was given back once.
    assert plan.pages_in_use == [0] * shape.replicas
    assert plan.unfinished() == []
    for replica in plan._replicas:
        assert sorted(replica.free) == list(range(shape.pages))
        assert not any(replica.readers)
        assert sorted(replica.rows) == list(range(shape.waiting))


@hypothesis.settings(max_examples=200)
@hypothesis.given(workloads(), st.integers(0, 2), st.integers(0, 1), st.integers(1, 30))
def test_tokens_are_told_once_and_in_order(workload, ahead, scarce, after):
    """Also of samples that were sent back and draw again, and of those cut off."""
    shape, prompts = workload
    if scarce:
        shape = dataclasses.replace(shape, pages=shape.slot_pages + 1)
    told = collections.defaultdict(list)
    telling = sampler._Telling(lambda i, j, tokens: told[i, j].extend(tokens))
    plan, ended = Scheduler(shape, prompts, [STOP]), []
    for result in sampler.run(
        plan,
        Machine(shape),
        lambda: len(ended) >= after,
        ahead=ahead,
        on_read=telling,
    ):
        ended.append(result.request.name)
        assert told[result.request.name] == result.tokens
    for result in plan.unfinished():
        name = result.request.name
        # One that was sent back has been told further than it stands.
        assert told[name][: len(result.tokens)] == result.tokens


@hypothesis.settings(max_examples=100)
@hypothesis.given(workloads(), st.integers(0, 20))
def test_an_end_before_the_end_loses_nothing(workload, after):
    """Cut off after some samples, what is there goes on as if it had not been."""
    shape, prompts = workload
    requests = {r.name: (p, r) for p in prompts for r in p.requests}
    want = {name: whole(*pair)[0] for name, pair in requests.items()}
    plan, ended = Scheduler(shape, prompts, [STOP]), {}
    for result in sampler.run(plan, Machine(shape), lambda: len(ended) >= after):
        ended[result.request.name] = result.tokens
    rest = {result.request.name: result.tokens for result in plan.unfinished()}
    assert set(ended) | set(rest) == set(want)
    assert not set(ended) & set(rest)
    for name, tokens in {**ended, **rest}.items():
        assert tokens == want[name][: len(tokens)]
    again = [
        Prompt(
            np.concatenate([requests[name][0].tokens, tokens]).astype(int),
            collections.deque(
                [
                    Request(
                        name,
                        requests[name][1].key,
                        requests[name][1].limit - len(tokens),
                        requests[name][1].drawn + len(tokens),
                    )
                ]
            ),
        )
        for name, tokens in rest.items()
    ]
    for result in sampler.run(Scheduler(shape, again, [STOP]), Machine(shape)):
        name = result.request.name
        assert rest[name] + result.tokens == want[name]


def small(**other):
    sizes = {
        "replicas": 1,
        "slots": 4,
        "pages": 40,
        "page_tokens": 4,
        "slot_pages": 10,
        "prefill_blocks": 2,
        "block_tokens": 2,
        "decode_steps": 4,
    }
    return Shape(**{**sizes, **other})


def run(shape, prompts, stop_ids=()):
    plan, machine = Scheduler(shape, prompts, stop_ids), Machine(shape)
    order = [r.request.name for r in sampler.run(plan, machine)]
    return plan, machine, order


def test_a_prompt_is_computed_once_and_its_full_pages_are_shared():
    plan, _, _ = run(small(), prompts_of([10], [4], [4], 0))
    assert plan.stats["prefill_tokens"] == 10
    # Three samples copy the partial page, the fourth takes it.
    assert plan.stats["copied_pages"] == 3
    # 2 shared pages, 4 third pages, 4 to grow into: 10 + 4 tokens are 4 pages.
    assert plan.stats["peak_pages"] == 2 + 4 + 4
    assert plan.stats["preempted_samples"] == 0


def test_slots_are_refilled_without_a_lost_step_where_limits_are_known():
    lengths = [3] * 40
    limits = [4 + 4 * (i % 3) for i in range(40)]
    plan, _, _ = run(small(prefill_blocks=8), prompts_of(lengths, [1] * 40, limits, 0))
    # 40 samples in 4 slots, by calls of 4 steps.
    best = sum(limits) / 4
    assert plan.stats["decode_steps"] <= best + 3 * 4
    assert plan.stats["slot_steps"] == sum(limits)


def test_decoding_waits_for_one_prefill_at_most_once_the_slots_are_filled():
    # A prefill has room for two short prompts, or for a fifth of a long one.
    shape = small(slots=16, pages=200, slot_pages=15)
    prompts = prompts_of([2] * 15 + [20] * 3, [1] * 18, [40] * 15 + [4] * 3, 0)
    _, machine, order = run(shape, prompts)
    text = "".join(call[0] for call in machine.calls)
    # 7.5 prefills fill 15 slots; the last has begun the first long prompt.
    assert text.startswith("p" * 8 + "d" + "pd" * 7)
    assert order[0] == (15, 0)  # Long before the others end.


def test_slots_are_filled_first_also_for_a_group_that_fills_them_alone():
    # One sample decodes; the next prompt takes 15 prefills, its group all other slots.
    prompts = prompts_of([2, 60], [1, 16], [40, 4], 0)
    shape = small(slots=16, pages=400, slot_pages=16)
    _, machine, _ = run(shape, prompts)
    text = "".join(call[0] for call in machine.calls)
    assert text.startswith("p" * 16 + "d")


class Watched(Scheduler):
    """Checks who is sent back for want of pages."""

    def _send_back(self, replica, prompt):
        spared = replica.ready[:1]  # The oldest may be just about to begin.
        ages = [p.age for p in replica.prompts if p not in spared]
        assert not ages or prompt.age >= max(ages)
        super()._send_back(replica, prompt)
        assert [p.age for p in self._queue] == sorted(p.age for p in self._queue)

    def _vacate(self, replica, slot):
        super()._vacate(replica, slot)
        if slot.to_draw and slot.tokens[-1:] != [STOP]:  # Preempted.
            order = slot.request.order
            assert all(s.request.order < order for s in replica.active)


@hypothesis.settings(max_examples=300)
@hypothesis.given(workloads(), st.integers(0, 1))
def test_who_goes_back_is_the_youngest(workload, ahead):
    shape, prompts = workload
    shape = dataclasses.replace(shape, pages=shape.slot_pages + 2)
    plan = Watched(shape, prompts, [STOP])
    count = sum(len(prompt.requests) for prompt in prompts)
    assert len(list(sampler.run(plan, Machine(shape), ahead=ahead))) == count


def test_after_a_preemption_nothing_begins_until_a_sample_ends():
    shape = small(pages=80, slots=16, slot_pages=30)  # 3 samples fit at their ends.
    plan, _, _ = run(shape, prompts_of([4] * 64, [4] * 64, [100] * 64, 0))
    assert plan.stats["preempted_samples"] > 0
    # Without the pause, prompts are computed and sent back over and over, 820 times.
    assert plan.stats["preempted_prompts"] < 100


def test_without_pages_the_youngest_wait_and_the_oldest_go_on():
    shape = small(pages=11, slots=4)
    prompts = prompts_of([8] * 4, [1] * 4, [30] * 4, 0)
    plan, _, order = run(shape, prompts, [])
    assert plan.stats["preempted_samples"] > 0
    assert order[0] == (0, 0)
    assert plan.pages_in_use == [0]


def test_a_sample_that_is_sent_back_is_not_told_of_again():
    shape = small(pages=11, slots=4)
    prompts = prompts_of([8] * 4, [1] * 4, [30] * 4, 0)
    want = {(i, 0): whole(p, p.requests[0])[0] for i, p in enumerate(prompts)}
    told = collections.defaultdict(list)
    plan = Scheduler(shape, prompts, [STOP])
    telling = sampler._Telling(lambda i, j, tokens: told[i, j].extend(tokens))
    list(sampler.run(plan, Machine(shape), on_read=telling))
    assert plan.stats["preempted_tokens"] > 0
    assert told == want


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_fill_evenly(replicas):
    shape = small(replicas=replicas, prefill_blocks=4)
    plan = Scheduler(shape, prompts_of([4] * 8, [1] * 8, [8] * 8, 0), [])
    plan.next_prefill()
    plan.next_prefill()
    counts = [r.num_active + r.waiting_requests for r in plan._replicas]
    assert max(counts) - min(counts) <= 1
    assert scheduler.Shape.pages_for(shape, 9) == 3
