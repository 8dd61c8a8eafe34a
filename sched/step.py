"""The vocabulary of a step: what the Batcher, the Runner and the simulator hand to each other.

Frozen values of plain ints.  There is no prefill or decode phase: a request's computed tokens catch up with its total
tokens, by one token (a decode) or by a chunk of several.  Token ids are not known here: they belong to the engine.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

# block id = set << SLOT_BITS | slot: one id names the KV of `block_tokens` tokens in every layer
SLOT_BITS = 12
MAX_SLOTS = 1 << SLOT_BITS


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to compute.  Times in seconds on the clock whose `now` is handed to the Batcher.

    `ttft_s` and `tpot_s` are the SLO: first token within `ttft_s` of `arrival_s`, then one every `tpot_s`.
    `keys` name the full blocks of the prompt (sched/prefix.py), none where it is not to be cached; `reads_cache` false:
    all of it is computed, though others may use it then.
    """

    rid: int
    prompt_tokens: int
    max_tokens: int
    arrival_s: float = 0.0
    ttft_s: float = 10.0
    tpot_s: float = 1.0
    priority: int = 0
    tenant: str = ""
    adapter_id: int = 0
    keys: tuple[bytes, ...] = ()
    reads_cache: bool = True


class Chunk(NamedTuple):
    """`count` tokens of request `rid` from position `start`; `samples`: it reaches the end, its last row is sampled."""

    rid: int
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    samples: bool


class Grant(NamedTuple):
    """Blocks to append to the block table of request `rid`, before the step runs."""

    rid: int
    blocks: tuple[int, ...]


class Move(NamedTuple):
    """The KV of block `source`, of every layer, is copied to block `target` before the step runs."""

    source: int
    target: int


class Patch(NamedTuple):
    """Entry `index` of the block table of request `rid` is `block` from this step on."""

    rid: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    block: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass.  Rows are `decode` (one token a request, each sampled), then `chunks`, in this order.

    `left` are requests whose block table is to be dropped first (ended, aborted or preempted since the last plan); a
    preempted one may come back in the same plan.  `joins` are requests that enter, or enter again: their first chunk is
    here, and starts where the cached part of their tokens ends.  `moves` are made first of all, behind the step before;
    `patches` follow them, and the grants.  The decodes read `context` tokens, and the step is predicted to take `seconds`.
    `shed`: waiting requests that the policy has given up; they have ended, with nothing to be dropped.
    """

    step: int
    decode: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    grants: tuple[Grant, ...]
    left: tuple[int, ...]
    joins: tuple[int, ...] = ()
    seconds: float = 0.0
    context: int = 0
    moves: tuple[Move, ...] = ()
    patches: tuple[Patch, ...] = ()
    shed: tuple[int, ...] = ()

    @property
    def empty(self) -> bool:
        """Nothing to execute; `left` may still name tables to drop, and `shed` requests that have ended."""
        return not (self.decode or self.chunks)

    @property
    def num_tokens(self) -> int:
        return len(self.decode) + sum(c.count for c in self.chunks)


class SetSource(Protocol):
    """Where a BlockPool gets its slab sets: the shared slab pool of a GPU, or a counter in tests and the simulator."""

    def lease(self, *, urgent: bool = False) -> int | None:
        """A set id (dense, small, reused), or None when refused.  `urgent` may use the liveness reserve."""

    def give_back(self, set_id: int) -> None:
        """The set is empty and no enqueued step names it."""
