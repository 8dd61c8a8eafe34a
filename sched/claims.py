"""What a sequence takes from the cache of blocks when it is admitted, and what it puts there as its blocks fill."""

from collections import Counter
from collections.abc import Iterable

from sched.blocks import BlockPool
from sched.sequence import Seq
from sched.step import StepPlan


def claim(pool: BlockPool, seq: Seq, headroom: int, alone: bool) -> bool:
    """Blocks for all tokens of `seq`, cached ones first; False and no change where there are none.

    At least the last token is left to compute: its row is sampled.  `alone`: the liveness reserve may be used.
    """
    P = pool.block_tokens
    hits: list[int] = []
    if seq.keys and seq.request.reads_cache:
        hits = pool.match(seq.keys[: (seq.total - 1) // P])
        pool.share(hits)  # before anything is evicted for the rest
    needed = -(-seq.total // P) - len(hits)
    blocks = pool.allocate(needed, headroom=headroom)
    if blocks is None and alone:
        blocks = pool.allocate(needed, urgent=True)
    if blocks is None:
        pool.release(reversed(hits))
        return False
    seq.blocks = hits + blocks
    seq.keyed = len(hits)
    seq.computed = len(hits) * P
    seq.source = pool.written(hits) if hits else -1
    return True


def publish(pool: BlockPool, seq: Seq, tokens: int, step: int = -1) -> None:
    """The first `tokens` of `seq` are written when `step` has run, -1: they have been."""
    if seq.keyed == len(seq.keys):
        return
    count = min(tokens // pool.block_tokens, len(seq.keys))
    if seq.keyed < count:
        new = slice(seq.keyed, count)
        pool.publish(seq.blocks[new], seq.keys[new], step)
        seq.keyed = count


def spoiled(plan: StepPlan, seqs: Iterable[Seq]) -> list[int]:
    """Whose keys and values cannot be trusted when the step has failed: those in it, those whose blocks it moved, and
    those who found in the cache what it, or a step planned since, was to write."""
    named = {*plan.decode, *(c.rid for c in plan.chunks), *(p.rid for p in plan.patches)}
    return [seq.rid for seq in seqs if seq.rid in named or seq.source >= plan.step]


def check_held(pool: BlockPool, tables: Iterable[list[int]]) -> None:
    """AssertionError unless every live block is in exactly as many of `tables` as it has references."""
    counts = Counter(block for table in tables for block in table)
    found = pool.references()
    wrong = {block for block in counts.keys() | found.keys() if counts[block] != found.get(block, 0)}
    assert not wrong, f"blocks {sorted(wrong)[:8]} are held more or less often than they are referred to"
