"""Seq: what the Batcher keeps of one request, and the states it passes through.

Counts are lazy: a running sequence decodes in every planned step, so it stores the step `base` up to which `produced`
is exact, and nothing is touched per token.  Whoever takes it out of the running set settles the count first.
"""

from enum import Enum

from sched.step import Request


class State(Enum):
    WAITING = "waiting"  # holds nothing: not begun, or preempted
    PREFILLING = "prefilling"  # holds the blocks of all its tokens, some chunks are still to be planned
    RUNNING = "running"  # decodes in every step
    PAUSED = "paused"  # needs one more block before it can decode
    ENDING = "ending"  # its last token is in a planned step
    GONE = "gone"


class Seq:
    """`order` counts first admissions, from 0: the lowest is the eldest, and is preempted last."""

    __slots__ = (
        "base",
        "blocks",
        "computed",
        "end",
        "epoch",
        "first_s",
        "keyed",
        "keys",
        "last",
        "order",
        "phase",
        "produced",
        "request",
        "rid",
        "serial",
        "source",
        "state",
    )

    def __init__(self, request: Request, serial: int) -> None:
        self.request = request
        self.rid = request.rid
        self.serial = serial  # counts arrivals: breaks ties
        self.order = -1
        self.state = State.WAITING
        self.produced = 0  # tokens sampled in steps up to `base`
        self.base = -1
        self.computed = 0  # prefilling: positions covered by chunks planned so far
        self.last = -1  # newest step that names it; while running, every planned step does
        self.first_s: float | None = None  # when its first token came out
        self.blocks: list[int] = []
        self.keys = list(request.keys)  # of its full blocks, as far as they are known
        self.keyed = 0  # blocks that were found in the cache or published
        self.source = -1  # newest step that was to write a block found in the cache, -1: all were written
        # set while running: the step of its last token, its place in the ring, and a stamp for lazy deletion
        self.end = -1
        self.phase = -1
        self.epoch = 0

    @property
    def total(self) -> int:
        """Tokens known at `base`: prompt and produced."""
        return self.request.prompt_tokens + self.produced

    @property
    def remaining(self) -> int:
        """Tokens to be sampled after `base`."""
        return self.request.max_tokens - self.produced
