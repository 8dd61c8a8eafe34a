"""The bytes of a slab table: header, one row a model, the owner column, the free stack, the plan as JSON.  No torch.

The owner column, one int64 a slab (generation | owner | state), is the only truth.  A freed slab keeps its owner and
generation: they tell a double free from a stale one, and whose bytes are still in it.  All the rest that changes is
derived (`derive`) or statistics; `find_fault` says where the derived part and the truth differ.  Which models take part
is a word of their rows, the agent's: who is unloaded or asleep has no reserve.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sched.slabs import LayerGroup, PoolPlan, SetShape

Int64s = NDArray[np.int64]

MAGIC = 0x6D696E736C616273  # "minslabs"
VERSION = 5

# a word: the low 2 bits are the state, then 14 bits of owner, then the generation
FREE, LIVE, DRAINING, AWAY = range(4)  # away: of a segment without memory, or about to be
STATES = ("free", "live", "draining", "away")
STATE_BITS, OWNER_BITS = 2, 14
STATE_MASK, OWNER_MASK = (1 << STATE_BITS) - 1, (1 << OWNER_BITS) - 1
NOBODY = OWNER_MASK

# header: a constant part under a checksum, then what changes
HEAD_WORDS = 64
H_MAGIC, H_VERSION, H_BYTES, H_SLABS, H_MODELS, H_PLAN_BYTES, H_CRC = range(7)
H_DIRTY, H_TOP, H_SERIAL, H_HOLDER, H_UNFILLED, H_REPAIRS, H_QUOTAS, H_LIVENESS = range(8, 16)
# the prefill token (prefill_token.py): who has it and until when, and since when nobody has
H_TURN, H_TURN_FREED = 16, 17
# slabs that are away, and a bit for each segment without memory (slab_segments.py)
H_AWAY, H_GONE, GONE_WORDS, GONE_BITS = 18, 19, 5, 60
# H_QUOTAS: no quotas, quotas that bind while another model has a claim, quotas that always bind
NO_QUOTAS, WHILE_CLAIMED, ALWAYS = range(3)
# a model's row: derived counts, statistics, the agent's words, then what its worker publishes.  The agent's, in slabs: the
# quota; the reserve, OUT while the model takes no part; what must come free before it can take part, 0 if it does not ask
ROW_WORDS = 32
R_LIVE, R_DRAINING, R_LEASES, R_RETURNS, R_REFUSED, R_QUOTA, R_RESERVE, R_WANTED = range(8)
R_STATUS = 8
OUT = -1
# sets: `demand` beyond those held, `used` by requests.  Blocks: `live_blocks` of requests, `cached_blocks` of nobody.
# A reclaim begins when others are short and ends when this model has given back its part.  `prefill_since_ns`: it waits
# for the prefill token since then; `due_ns`: when its next decoded token is due; 0: it does not, nothing decodes.
# `vacatable`: sets it could empty by moving blocks, the first of them `vacate_milli` full; `vacated`: those it has emptied
STATUS = (
    "demand",
    "used",
    "live_blocks",
    "cached_blocks",
    "waiting",
    "heartbeat_ns",
    "slack_us",
    "step_us",
    "sequence_tokens",
    "urgency_milli",
    "given_up",
    "reclaims",
    "reclaim_us",
    "reclaim_max_us",
    "prefill_since_ns",
    "due_ns",
    "prefill_waits",
    "prefill_wait_us",
    "prefill_takeovers",
    "vacatable",
    "vacate_milli",
    "vacated",
    "moved_bytes",
)
R_DEMAND = R_STATUS + STATUS.index("demand")
assert R_STATUS + len(STATUS) <= ROW_WORDS


class Offsets(NamedTuple):
    """Byte positions of the parts behind the header."""

    rows: int
    words: int
    stack: int
    plan: int

    @classmethod
    def of(cls, num_models: int, num_slabs: int) -> "Offsets":
        rows = 8 * HEAD_WORDS
        words = rows + 8 * ROW_WORDS * num_models
        return cls(rows, words, words + 8 * num_slabs, words + 16 * num_slabs)


class Derived(NamedTuple):
    """What follows from the owner column: the free slabs, (live, draining) of each model, unfilled reserves."""

    free: Int64s
    held: list[tuple[int, int]]
    unfilled: int


def pack(generation: int, owner: int, state: int) -> int:
    return generation << STATE_BITS + OWNER_BITS | owner << STATE_BITS | state


def state_of(words: Int64s) -> Int64s:
    return words & STATE_MASK


def owner_of(words: Int64s) -> Int64s:
    return words >> STATE_BITS & OWNER_MASK


def generation_of(words: Int64s) -> Int64s:
    return words >> STATE_BITS + OWNER_BITS


def planned_reserves(plan: PoolPlan, out: Collection[str] = ()) -> tuple[int, ...]:
    """Slabs that each model cannot lose; OUT for those named in `out`."""
    return tuple(OUT if n in out else m.reserve_sets * m.layers for n, m in plan.models.items())


def liveness_of(plan: PoolPlan, reserves: Sequence[int]) -> int:
    """Slabs of the liveness reserve: as planned, and no more than the longest sequence of those that take part needs."""
    if OUT not in reserves:
        return plan.liveness_slabs
    here = [m for m, reserve in zip(plan.models.values(), reserves, strict=True) if reserve != OUT]
    return min(
        plan.liveness_slabs, max(((m.max_len_sets - m.reserve_sets) * m.layers for m in here), default=0)
    )


def derive(words: Int64s, reserves: Sequence[int]) -> Derived:
    taken = words[state_of(words) != FREE]
    # one bin a (owner, state); owners that do not exist fall off the end, `find_fault` reports them
    bins = np.bincount(taken & (1 << STATE_BITS + OWNER_BITS) - 1, minlength=len(reserves) << STATE_BITS)
    held = [
        (int(bins[i << STATE_BITS | LIVE]), int(bins[i << STATE_BITS | DRAINING]))
        for i in range(len(reserves))
    ]
    unfilled = sum(max(0, reserve - sum(h)) for reserve, h in zip(reserves, held, strict=True))
    return Derived(np.flatnonzero(state_of(words) == FREE), held, unfilled)


def find_fault(words: Int64s, num_models: int, serial: int) -> str | None:
    """What is impossible in the owner column itself, or None."""
    states, owners, generations = state_of(words), owner_of(words), generation_of(words)
    away = (states == AWAY) & (owners == NOBODY)
    wrong = (states == AWAY) & ~away | (owners >= num_models) & (owners != NOBODY)
    bad = np.flatnonzero(wrong | (words < 0))
    if len(bad):
        return f"slab {bad[0]} has the impossible word {words[bad[0]]:#x}"
    bad = np.flatnonzero((owners == NOBODY) & (states != FREE) & ~away)
    if len(bad):
        return f"slab {bad[0]} is {STATES[states[bad[0]]]} and belongs to nobody"
    if generations.max(initial=0) > serial:
        return f"generation {generations.max()} was never given, the last is {serial}"
    # one pair (generation, owner) a lease: a generation that comes twice has two owners
    leases = np.unique(words[(states != FREE) & ~away] >> STATE_BITS) >> OWNER_BITS
    twice = leases[1:][leases[1:] == leases[:-1]]
    return f"lease {twice[0]} belongs to two models" if len(twice) else None


def find_stack_fault(stack: Int64s, words: Int64s) -> str | None:
    """Where the free stack and the owner column differ, or None."""
    if ((stack < 0) | (stack >= len(words))).any():
        return "the free stack names slabs outside the pool"
    states = state_of(words)
    taken = stack[states[stack] != FREE]
    if len(taken):
        return f"slab {taken[0]} is owned twice: it is {STATES[states[taken[0]]]} and on the free stack"
    times = np.bincount(stack, minlength=len(words))
    if times.max(initial=0) > 1:
        return f"slab {times.argmax()} is on the free stack twice"
    lost = np.flatnonzero((states == FREE) & (times == 0))
    return f"slab {lost[0]} is lost: free, and not on the free stack" if len(lost) else None


def misuse(names: Sequence[str], owner: int, generation: int, slab: int, word: Int64s) -> str:
    """Why `owner` may not hand back this slab of a lease, whose word is something else."""
    real, last, state = (
        int(owner_of(word)[0]),
        int(generation_of(word)[0]),
        STATES[int(state_of(word)[0])],
    )
    if last != generation:
        kind = "stale generation"
    elif real != owner:
        kind = "foreign free"
    else:
        kind = "double free"
    who = "nobody" if real == NOBODY else names[real]
    return (
        f"{kind}: {names[owner]} hands back slab {slab} of lease {generation}, which is {state} "
        f"and was last leased by {who} as {last}"
    )


def encode_table(plan: PoolPlan, out: Collection[str] = ()) -> list[tuple[int, bytes]]:
    """(position, bytes) of the parts of a new table that are not zero; its size is in the header.  `out`: models that take
    no part yet."""
    blob = json.dumps(dataclasses.asdict(plan)).encode()
    at = Offsets.of(len(plan.models), plan.num_slabs)
    head = np.zeros(HEAD_WORDS, np.int64)
    head[:H_CRC] = MAGIC, VERSION, at.plan + len(blob), plan.num_slabs, len(plan.models), len(blob)
    head[H_CRC] = zlib.crc32(blob, zlib.crc32(head[:H_CRC].tobytes()))
    rows = np.zeros((len(plan.models), ROW_WORDS), np.int64)
    rows[:, R_RESERVE] = planned_reserves(plan, out)
    words = np.full(plan.num_slabs, pack(0, NOBODY, FREE), np.int64)
    return [(0, head.tobytes()), (at.rows, rows.tobytes()), (at.words, words.tobytes()), (at.plan, blob)]


def read_plan(fd: int, size: int, given: int) -> PoolPlan:
    """The plan in the table behind `fd`; ValueError when that is not a whole table of our version."""
    head = np.frombuffer(os.pread(fd, 8 * HEAD_WORDS, 0).ljust(8 * HEAD_WORDS, b"\0"), np.int64)
    if head[H_MAGIC] != MAGIC:
        raise ValueError(f"fd {given} is not a minserve slab table")
    if head[H_VERSION] != VERSION:
        raise ValueError(
            f"fd {given} is a slab table of version {head[H_VERSION]}, this minserve reads {VERSION}"
        )
    at = Offsets.of(int(head[H_MODELS]), int(head[H_SLABS]))
    blob = os.pread(fd, max(size - at.plan, 0), at.plan) if 0 <= at.plan <= size else b""
    crc = zlib.crc32(blob, zlib.crc32(head[:H_CRC].tobytes()))
    if (size, len(blob), crc) != (head[H_BYTES], head[H_PLAN_BYTES], head[H_CRC]):
        raise ValueError(f"fd {given} is a slab table with a damaged header ({size} bytes)")
    fields: dict[str, Any] = json.loads(blob)
    for shape in fields["models"].values():
        shape["groups"] = tuple(LayerGroup(**group) for group in shape["groups"])
        shape["places"] = tuple((slab, byte) for slab, byte in shape["places"])
    fields["models"] = {name: SetShape(**shape) for name, shape in fields["models"].items()}
    return PoolPlan(**fields)
