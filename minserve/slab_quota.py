"""The quotas in a slab table: who may lease beyond its own, and who has to give back.  No torch.

A quota promises nothing: the reserves do.  It says who gives way when there is not enough for all.  A model within its
quota has a claim to what it wants and cannot get; a lease beyond the quota leaves what is claimed alone, and whoever
holds more than its quota gives back its part of what is missing.  While nobody has a claim, quotas bind nobody.  A model
that is loaded or woken claims its reserve; to make room for that, all beyond the own reserve counts as beyond a quota
where there are no quotas.
All of it is single words, each with one writer, and read as they are: a stale one costs a moment, never a slab.
"""

from collections.abc import Iterable, Sequence

from minserve.slab_words import (
    ALWAYS,
    H_LIVENESS,
    H_QUOTAS,
    H_TOP,
    H_UNFILLED,
    NO_QUOTAS,
    R_DEMAND,
    R_DRAINING,
    R_LIVE,
    R_QUOTA,
    R_RESERVE,
    R_WANTED,
    ROW_WORDS,
    WHILE_CLAIMED,
)
from sched.slabs import PoolPlan


class SlabQuotas:
    """A view of the header and the rows of a table."""

    def __init__(self, head: "memoryview[int]", rows: "memoryview[int]", plan: PoolPlan) -> None:
        self._head, self._rows = head, rows
        self._layers = tuple(m.layers for m in plan.models.values())
        self._slabs = plan.num_slabs
        self._wanted_at = tuple(i * ROW_WORDS + R_WANTED for i in range(len(self._layers)))

    def write(self, sets: Sequence[int] | None, *, strict: bool = False) -> None:
        """New quotas of all models, None: there are none any more.  One process writes them, at any moment.

        What shrinks is written before what grows: a writer that dies in between leaves no more than there is.
        """
        if sets is None:
            self._head[H_QUOTAS] = NO_QUOTAS
            return
        new = [s * layers for s, layers in zip(sets, self._layers, strict=True)]
        if min(new, default=0) < 0 or sum(new) > self._slabs:
            raise ValueError(
                f"quotas must be sets of together at most {self._slabs} slabs, got {tuple(sets)}: {sum(new)}"
            )
        grows = [n > self._rows[i * ROW_WORDS + R_QUOTA] for i, n in enumerate(new)]
        for now in (False, True):
            for i, n in enumerate(new):
                if grows[i] == now:
                    self._rows[i * ROW_WORDS + R_QUOTA] = n
        self._head[H_QUOTAS] = ALWAYS if strict else WHILE_CLAIMED

    def quota(self, owner: int) -> int | None:
        """Slabs, at least the reserve; None: as much as there is."""
        if self._head[H_QUOTAS] == NO_QUOTAS:
            return None
        return max(self._reserve(owner), self._rows[owner * ROW_WORDS + R_QUOTA])

    def _reserve(self, owner: int) -> int:
        return max(0, self._rows[owner * ROW_WORDS + R_RESERVE])

    def wanted(self, owner: int) -> int:
        """Slabs that must come free before the model can take part; 0 where it does not ask, or does."""
        return max(0, self._rows[owner * ROW_WORDS + R_WANTED])

    @property
    def _asked(self) -> bool:
        for at in self._wanted_at:  # noqa: SIM110  a generator takes three times as long, once a lease
            if self._rows[at]:
                return True
        return False

    @property
    def strict(self) -> bool:
        """They bind whether or not anybody has a claim."""
        return self._head[H_QUOTAS] == ALWAYS

    def beyond(self, owner: int, n: int) -> bool:
        """Whether `n` slabs more would be over its quota."""
        rows, row, mode = self._rows, owner * ROW_WORDS, self._head[H_QUOTAS]
        held = rows[row + R_LIVE] + rows[row + R_DRAINING] + n
        limit = 0 if mode == NO_QUOTAS else rows[row + R_QUOTA]
        if held <= limit or held <= rows[row + R_RESERVE]:
            return False
        return mode != NO_QUOTAS or self._asked

    def claims(self, but: int = -1) -> int:
        """Slabs beyond their reserves that models within their quotas want and do not have, and reserves of those that ask
        to take part."""
        return sum(self._claim(i) + self.wanted(i) for i in range(len(self._layers)) if i != but)

    def excess(self, owner: int) -> int:
        """Slabs that the model is to give back now: of what is missing for the claims its part, as it is over quota."""
        over = self._over(owner)
        if over <= 0 or self.strict:
            return max(0, over)
        missing = self.claims(but=owner) - self.coming
        if missing <= 0:
            return 0
        # each word is read once: the agent may write new quotas at any moment
        total = over + sum(max(0, self._over(i)) for i in range(len(self._layers)) if i != owner)
        return min(over, -(-missing * over // total))

    def unmet(self, owner: int, limit: int | None = None) -> int:
        """Slabs that the model wants, up to `limit`, and does not have, beyond what its reserve keeps free for it."""
        row = owner * ROW_WORDS
        held = self._rows[row + R_LIVE] + self._rows[row + R_DRAINING]
        most = held + max(0, self._rows[row + R_DEMAND]) * self._layers[owner]
        return max(0, (most if limit is None else min(limit, most)) - max(held, self._reserve(owner)))

    @property
    def coming(self) -> int:
        """Slabs that are nobody's reserve, free or about to be."""
        draining = sum(self._rows[i * ROW_WORDS + R_DRAINING] for i in range(len(self._layers)))
        return self._head[H_TOP] + draining - self._head[H_UNFILLED] - self._head[H_LIVENESS]

    def missing(self, owners: Iterable[int], least: int = 0) -> int:
        """Slabs that these models want, whatever their quotas, at least `least`, and that are not to be had."""
        return max(least, sum(map(self.unmet, owners))) - self.coming

    def _claim(self, owner: int) -> int:
        quota = self.quota(owner)
        return 0 if quota is None else self.unmet(owner, quota)

    def _over(self, owner: int) -> int:
        quota = self.quota(owner)
        if quota is None:
            if not self._asked:
                return 0
            quota = self._reserve(owner)
        return self._rows[owner * ROW_WORDS + R_LIVE] - quota

    def fault(self) -> str | None:
        """What is impossible in the words, or None."""
        mode = self._head[H_QUOTAS]
        if mode not in (NO_QUOTAS, WHILE_CLAIMED, ALWAYS):
            return f"quotas are in the unknown mode {mode}"
        quotas = [self._rows[i * ROW_WORDS + R_QUOTA] for i in range(len(self._layers))]
        if min(quotas) < 0 or sum(quotas) > self._slabs:
            return f"quotas of {quotas} slabs in a pool of {self._slabs}"
        asked = [self._rows[i * ROW_WORDS + R_WANTED] for i in range(len(self._layers))]
        if min(asked) < 0 or max(asked) > self._slabs:
            return f"reserves of {asked} slabs are asked for in a pool of {self._slabs}"
        return None
