"""Which sample decodes in which slot, on which pages of the cache: the sampler's host side.

    queue -> prefilling -> ready -> slot -> finished
               (prompts)            (samples)

A prompt is computed once; its samples share its full pages, and each gets its own copy of
the last, partial one. Pages are given out as tokens need them. When there are none left the
youngest prompt that waits for a slot goes back, or, without one, the youngest sample: it
starts again from its prompt and, its randomness being a function of who it is, draws the
same tokens. Nothing begins then until a sample has ended.

Nothing here depends on time, on threads or on the device, so every process of a run takes
the same decisions. It runs ahead of the device: what is not known yet is only whether a
sample has met a stop token, and a slot that has does nothing until the host hears of it.

Shape letters: R replicas, B slots, X blocks of a prefill, Q tokens of a block, M pages of a
slot, S decoding steps.
"""

import bisect
import collections
import dataclasses
import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes that the sampler's programs are compiled for."""

    replicas: int  # Shards of the slots; they share no page.
    slots: int  # Of a replica: samples decoded at once.
    pages: int  # Of a replica.
    page_tokens: int
    slot_pages: int  # The most that one sample may use.
    prefill_blocks: int  # Of a replica, in one prefill.
    block_tokens: int  # Divides page_tokens. A block holds tokens of one prompt.
    decode_steps: int  # Of one call, at most.

    @property
    def waiting(self) -> int:
        """Prompts of a replica that may be computed and wait for slots."""
        return self.slots + self.prefill_blocks

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)


@dataclasses.dataclass(eq=False)
class Request:
    """One sample to draw."""

    name: Any  # Whatever identifies it to the caller.
    key: np.ndarray  # [4] uint32: key, prompt and sample of its random numbers.
    limit: int  # Tokens to draw, at least 1.
    drawn: int = 0  # Tokens of the response that already stand at the prompt's end.
    order: int = 0  # Its age, set by the scheduler: the oldest is 0.


@dataclasses.dataclass(eq=False)
class Prompt:
    """Tokens, and the samples of them that have no slot yet."""

    tokens: np.ndarray
    requests: collections.deque[Request]
    row: int = -1  # Of the replica's waiting states.
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0  # Tokens whose keys and values stand in the pages.

    @property
    def age(self) -> int:
        return self.requests[0].order


@dataclasses.dataclass(eq=False)
class Slot:
    """A sample that is being decoded."""

    index: int  # Among the replica's slots.
    request: Request
    prompt: Prompt
    length: int  # Tokens in the cache when all that was dispatched has run.
    to_draw: int  # Tokens left to dispatch,
    to_read: int  # and to hear of.
    pages: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)
    done: bool = False  # Stopped or preempted: what is still under way is ignored.

    @property
    def final_length(self) -> int:
        return self.length + self.to_draw


@dataclasses.dataclass(frozen=True)
class Finished:
    """A sample as far as it came."""

    request: Request
    tokens: list[int]
    logprobs: np.ndarray  # [n] float32.
    stopped: bool  # A stop token came.


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Arguments of one prefill: [R, X, ...] int32."""

    tokens: (
        np.ndarray
    )  # [R, X, Q]; a block's last token again where a prompt has ended.
    table: np.ndarray  # [R, X, M]
    start: np.ndarray  # Position of a block's first token.
    active: np.ndarray  # bool.
    row: np.ndarray  # The waiting state of the block's prompt.
    last: np.ndarray  # Place in the block of the prompt's last token; -1: it goes on.


@dataclasses.dataclass(frozen=True)
class Decode:
    """Arguments of one call of decoding, [R, B, ...] int32, and who stands where."""

    table: np.ndarray  # [R, B, M]
    limit: np.ndarray  # Tokens of the whole response; 0: an empty slot.
    key: np.ndarray  # [R, B, 4] uint32.
    source: np.ndarray  # The waiting state that a new sample begins with; -1: goes on.
    start: np.ndarray  # Of a new sample: tokens in its cache,
    drawn: np.ndarray  # and tokens of the response among them.
    steps: int
    pairs: int  # (slot, page) pairs in use at the end, of the fullest replica.
    copies: list[
        list[tuple[int, int]]
    ]  # A list a replica: (page, its copy), done first.
    cells: list[tuple[int, Slot, int]]  # Replica, sample, its steps.


# Of `Decode`, what the device gets.
DECODE_ARRAYS = ("table", "limit", "key", "source", "start", "drawn")


def empty_prefill(shape: Shape) -> Prefill:
    """No blocks."""
    R, X = shape.replicas, shape.prefill_blocks
    return Prefill(
        tokens=np.zeros((R, X, shape.block_tokens), np.int32),
        table=np.zeros((R, X, shape.slot_pages), np.int32),
        start=np.zeros((R, X), np.int32),
        active=np.zeros((R, X), bool),
        row=np.full((R, X), shape.waiting, np.int32),
        last=np.full((R, X), -1, np.int32),
    )


def empty_decode(shape: Shape) -> Decode:
    """No step of empty slots."""
    R, B = shape.replicas, shape.slots
    return Decode(
        table=np.zeros((R, B, shape.slot_pages), np.int32),
        limit=np.zeros((R, B), np.int32),
        key=np.zeros((R, B, 4), np.uint32),
        source=np.full((R, B), -1, np.int32),
        start=np.zeros((R, B), np.int32),
        drawn=np.zeros((R, B), np.int32),
        steps=0,
        pairs=0,
        copies=[[] for _ in range(R)],
        cells=[],
    )


class _Replica:
    """The pages and slots of one replica, and the prompts that are in it."""

    def __init__(self, shape: Shape):
        self.free = list(range(shape.pages))[::-1]
        self.readers = [0] * shape.pages
        self.rows = list(range(shape.waiting))[::-1]
        self.slots: list[Slot | None] = [None] * shape.slots
        self.empty = list(range(shape.slots))  # Slots, as a heap: the first is next.
        # What the device hears of each slot, by the names of `Decode`: [B, ...].
        idle = empty_decode(shape)
        self.standing = {name: getattr(idle, name)[0] for name in DECODE_ARRAYS}
        self.prefilling: Prompt | None = None
        self.ready: list[Prompt] = []  # The oldest first.
        self.crowded = False  # A sample was preempted, and none has ended since.

    def begin(self, slot: Slot) -> None:
        """Puts a sample into the first empty slot."""
        self.slots[heapq.heappop(self.empty)] = slot
        request, prompt = slot.request, slot.prompt
        for name, value in (
            ("table", 0),
            ("limit", request.drawn + request.limit),
            ("key", request.key),
            ("source", prompt.row),
            ("start", len(prompt.tokens)),
            ("drawn", request.drawn),
        ):
            self.standing[name][slot.index] = value

    def give(self, slot: Slot, pages: list[int]) -> None:
        """More pages for a sample, in its table too."""
        held = len(slot.pages)
        slot.pages = slot.pages + pages
        self.standing["table"][slot.index, held : len(slot.pages)] = pages

    def take(self, count: int) -> list[int]:
        pages = [self.free.pop() for _ in range(count)]
        self.share(pages)
        return pages

    def share(self, pages: list[int]) -> None:
        for page in pages:
            self.readers[page] += 1

    def release(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self.readers[page] -= 1
            if not self.readers[page]:
                self.free.append(page)

    @property
    def active(self) -> list[Slot]:
        return [slot for slot in self.slots if slot is not None]

    @property
    def num_active(self) -> int:
        return len(self.slots) - len(self.empty)

    @property
    def prompts(self) -> list[Prompt]:
        return [*self.ready, *([self.prefilling] if self.prefilling else [])]

    @property
    def waiting_requests(self) -> int:
        return sum(len(prompt.requests) for prompt in self.prompts)


class Scheduler:
    """Gives out slots and pages. The caller turns what `next_prefill` and `next_decode`
    return into calls, in that order, and hands the results of decoding to `read`."""

    def __init__(
        self, shape: Shape, prompts: Sequence[Prompt], stop_ids: Sequence[int]
    ):
        """Every sample must fit into a replica's pages alone: see `check_fits`."""
        self.shape = shape
        self._stop_ids = np.asarray(stop_ids, np.int64)
        self._queue = list(prompts)  # The oldest first.
        self._replicas = [_Replica(shape) for _ in range(shape.replicas)]
        self._unread: dict[Slot, None] = {}  # Dispatched, not heard of to the end.
        requests = [request for prompt in prompts for request in prompt.requests]
        for order, request in enumerate(requests):
            request.order = order
        self.stats = dict.fromkeys(
            (
                "prefill_tokens",  # Of prompts, as often as they were computed.
                "prefill_calls",
                "decode_calls",
                "decode_steps",
                "slot_steps",  # Tokens drawn, by samples preempted later too.
                "preempted_samples",  # Sent back to their prompts for want of pages,
                "preempted_tokens",  # and their tokens, to be drawn again.
                "preempted_prompts",  # Computed, and sent back to the queue.
                "copied_pages",
                "peak_pages",  # In use, of the fullest replica.
            ),
            0,
        )

    # --- prefill ----------------------------------------------------------------------

    def next_prefill(self) -> Prefill | None:
        """The next blocks of prompts to compute, if slots will want them."""
        batch = empty_prefill(self.shape)
        R, X = batch.active.shape
        used = [0] * R
        waiting = [replica.waiting_requests for replica in self._replicas]
        wanted = [self._wanted(replica) for replica in self._replicas]
        load = [
            replica.num_active + waiting[r] for r, replica in enumerate(self._replicas)
        ]
        while True:
            # The emptiest first, a prompt a turn, so that replicas fill evenly.
            for r in sorted(range(R), key=load.__getitem__):
                replica = self._replicas[r]
                if used[r] == X:
                    continue
                prompt = replica.prefilling
                if prompt is None:
                    if waiting[r] < wanted[r]:
                        prompt = self._start_prompt(replica)
                    if prompt is None:
                        continue
                    waiting[r] += len(prompt.requests)
                    load[r] += len(prompt.requests)
                # A prefill that must be, and has room left, prepares for all slots.
                wanted[r] = self.shape.slots
                used[r] = self._add_blocks(batch, r, prompt, used[r])
                break
            else:
                break
        if not any(used):
            return None
        self.stats["prefill_calls"] += 1
        self._note_peak()
        return batch

    def _wanted(self, replica: _Replica) -> int:
        """Samples that should wait for slots: as many as will soon be free."""
        ending = [s for s in replica.active if s.to_draw <= self.shape.decode_steps]
        return len(replica.empty) + len(ending)

    def _start_prompt(self, replica: _Replica) -> Prompt | None:
        """Takes the next prompt of the queue, if there is room for it."""
        if not self._queue or not replica.rows:
            return None
        prompt, num_active = self._queue[0], replica.num_active
        need = self.shape.pages_for(len(prompt.tokens))
        # Each sample under way keeps a page to grow into.
        if need + num_active > len(replica.free) or (replica.crowded and num_active):
            return None
        self._queue.pop(0)
        prompt.pages, prompt.row = replica.take(need), replica.rows.pop()
        prompt.computed = 0
        replica.prefilling = prompt
        return prompt

    def _add_blocks(self, batch: Prefill, r: int, prompt: Prompt, used: int) -> int:
        """Puts blocks of the replica's prompt from `used` on; how many there are then."""
        replica, Q = self._replicas[r], self.shape.block_tokens
        total = len(prompt.tokens)
        while used < self.shape.prefill_blocks and prompt.computed < total:
            block = prompt.tokens[prompt.computed : prompt.computed + Q]
            batch.tokens[r, used] = block[-1]
            batch.tokens[r, used, : len(block)] = block
            batch.table[r, used, : len(prompt.pages)] = prompt.pages
            batch.start[r, used] = prompt.computed
            batch.active[r, used] = True
            batch.row[r, used] = prompt.row
            prompt.computed += len(block)
            if prompt.computed == total:
                batch.last[r, used] = len(block) - 1
                bisect.insort(replica.ready, prompt, key=lambda p: p.age)
                replica.prefilling = None
            self.stats["prefill_tokens"] += len(block)
            used += 1
        return used

    # --- decoding ---------------------------------------------------------------------

    def next_decode(self) -> Decode | None:
        """The next steps of all slots, old samples grown and new ones begun."""
        copies = []
        for replica in self._replicas:
            self._grow(replica)
            copies.append(self._admit(replica))
        left = [slot.to_draw for replica in self._replicas for slot in replica.active]
        if not left:
            return None
        steps = min(self.shape.decode_steps, max(left))
        self._note_peak()
        arrays = {
            name: np.stack([replica.standing[name] for replica in self._replicas])
            for name in DECODE_ARRAYS
        }
        cells, pairs = [], []
        for r, replica in enumerate(self._replicas):
            advanced = self._advance(replica, steps)
            cells += [(r, slot, slot_steps) for slot, slot_steps, _ in advanced]
            pairs.append(sum(pages for *_, pages in advanced))
        self.stats["copied_pages"] += sum(map(len, copies))
        self.stats["decode_calls"] += 1
        self.stats["decode_steps"] += steps
        return Decode(
            **arrays, steps=steps, pairs=max(pairs), copies=copies, cells=cells
        )

    def _grow(self, replica: _Replica) -> None:
        """Pages for the next steps of every sample, the oldest first."""
        growing = [s for s in replica.active if self._next_pages(s) > len(s.pages)]
        for slot in sorted(growing, key=lambda slot: slot.request.order):
            need = self._next_pages(slot) - len(slot.pages)
            while need > len(replica.free) and not slot.done:
                self._reclaim(replica)
            if not slot.done:
                replica.give(slot, replica.take(need))

    def _next_pages(self, slot: Slot) -> int:
        steps = self.shape.decode_steps
        return self.shape.pages_for(min(slot.length + steps, slot.final_length))

    def _reclaim(self, replica: _Replica, keep: Prompt | None = None) -> None:
        """Sends back the youngest waiting prompt, or else the youngest sample."""
        if prompts := [prompt for prompt in replica.prompts if prompt is not keep]:
            self._send_back(replica, max(prompts, key=lambda prompt: prompt.age))
            return
        slot = max(replica.active, key=lambda slot: slot.request.order)
        self._vacate(replica, slot)
        slot.done = True
        del self._unread[slot]
        replica.crowded = True
        self.stats["preempted_samples"] += 1
        self.stats["preempted_tokens"] += len(slot.tokens)
        # A prompt with requests waits somewhere already.
        if not slot.prompt.requests:
            self._queue.append(slot.prompt)
        bisect.insort(slot.prompt.requests, slot.request, key=lambda r: r.order)
        self._queue.sort(key=lambda prompt: prompt.age)

    def _send_back(self, replica: _Replica, prompt: Prompt) -> None:
        if prompt is replica.prefilling:
            replica.prefilling = None
        else:
            replica.ready.remove(prompt)
        replica.release(prompt.pages)
        replica.rows.append(prompt.row)
        prompt.pages = []
        bisect.insort(self._queue, prompt, key=lambda prompt: prompt.age)
        self.stats["preempted_prompts"] += 1

    def _vacate(self, replica: _Replica, slot: Slot) -> None:
        """Frees a slot and its pages. Both may be used again at once: what the sample still
        has under way was dispatched before."""
        replica.slots[slot.index] = None
        heapq.heappush(replica.empty, slot.index)
        replica.standing["limit"][slot.index] = 0
        replica.release(slot.pages)
        slot.pages = []

    def _admit(self, replica: _Replica) -> list[tuple[int, int]]:
        """Gives free slots to samples of computed prompts; the pages to be copied."""
        copies = []
        replica.standing["source"][:] = -1
        while replica.ready and replica.empty:
            if replica.crowded and replica.num_active:
                break
            prompt, P = replica.ready[0], self.shape.page_tokens
            request, length = prompt.requests[0], len(prompt.tokens)
            shared = length // P
            # The last sample takes the partial page itself.
            last = len(prompt.requests) == 1
            slot = Slot(
                replica.empty[0], request, prompt, length, request.limit, request.limit
            )
            need = self._next_pages(slot) - (len(prompt.pages) if last else shared)
            while not replica.num_active and need > len(replica.free):
                self._reclaim(replica, keep=prompt)
            if need + replica.num_active > len(replica.free) and replica.num_active:
                break
            fresh = replica.take(need)
            replica.begin(slot)
            if last:
                replica.give(slot, prompt.pages + fresh)
                prompt.pages = []
                replica.ready.pop(0)
                replica.rows.append(prompt.row)
            else:
                replica.give(slot, prompt.pages[:shared] + fresh)
                replica.share(prompt.pages[:shared])
                if length % P:
                    copies.append((prompt.pages[shared], fresh[0]))
            prompt.requests.popleft()
            self._unread[slot] = None
        return copies

    def _advance(self, replica: _Replica, steps: int) -> list[tuple[Slot, int, int]]:
        """Dispatches steps; the samples, their steps, and the pages they use then."""
        advanced = []
        for slot in replica.active:
            slot_steps = min(steps, slot.to_draw)
            slot.length += slot_steps
            slot.to_draw -= slot_steps
            advanced.append((slot, slot_steps, self.shape.pages_for(slot.length)))
            if not slot.to_draw:  # It ends in this call: the next may use its slot.
                self._vacate(replica, slot)
                replica.crowded = False
        return advanced

    # --- results ----------------------------------------------------------------------

    def read(
        self, batch: Decode, tokens_SRB: np.ndarray, logprobs_SRB: np.ndarray
    ) -> list[Finished]:
        """Takes in what a call drew; the samples that it finished, in order of slots."""
        finished = []
        stops_SRB = np.isin(tokens_SRB, self._stop_ids)
        stop_RB = np.where(
            stops_SRB.any(axis=0), stops_SRB.argmax(axis=0), len(stops_SRB)
        ).tolist()
        tokens_RBS = tokens_SRB.transpose(1, 2, 0).tolist()
        logprobs_RBS = logprobs_SRB.transpose(1, 2, 0)
        for r, slot, steps in batch.cells:
            if slot.done:
                continue
            b = slot.index
            stopped = stop_RB[r][b] < steps
            if stopped:
                steps = stop_RB[r][b] + 1
            slot.tokens += tokens_RBS[r][b][:steps]
            slot.logprobs.append(logprobs_RBS[r, b, :steps].copy())
            slot.to_read -= steps
            self.stats["slot_steps"] += steps
            if not stopped and slot.to_read:
                continue
            replica = self._replicas[r]
            if replica.slots[b] is slot:
                self._vacate(replica, slot)
                replica.crowded = False
            slot.done = True
            del self._unread[slot]
            finished.append(_result(slot, bool(stopped)))
        return finished

    def unfinished(self) -> list[Finished]:
        """All samples that have not come to their end, in order of age."""
        slots = [_result(slot, stopped=False) for slot in self._unread]
        waiting = [
            Finished(request, [], np.zeros(0, np.float32), False)
            for prompt in self._waiting_prompts()
            for request in prompt.requests
        ]
        return sorted(slots + waiting, key=lambda result: result.request.order)

    def _waiting_prompts(self) -> Iterator[Prompt]:
        yield from self._queue
        for replica in self._replicas:
            yield from replica.prompts

    @property
    def nearly_full(self) -> bool:
        """Fifteen of sixteen slots have a sample, or one that may begin."""
        found = sum(
            min(
                self.shape.slots,
                len(replica.active) + sum(len(p.requests) for p in replica.ready),
            )
            for replica in self._replicas
        )
        return 16 * found >= 15 * self.shape.replicas * self.shape.slots

    @property
    def pages_in_use(self) -> list[int]:
        return [self.shape.pages - len(replica.free) for replica in self._replicas]

    def _note_peak(self) -> None:
        self.stats["peak_pages"] = max(self.stats["peak_pages"], *self.pages_in_use)


def _result(slot: Slot, stopped: bool) -> Finished:
    logprobs = np.concatenate([np.zeros(0, np.float32), *slot.logprobs])
    return Finished(slot.request, slot.tokens, logprobs, stopped)
