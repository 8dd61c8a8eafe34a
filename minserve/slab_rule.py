"""Whether a lease may be given: by the reserves, the liveness reserve and the quotas of a slab table.  No torch.

Asked under the table's lock, once a lease, so it reads each word once and calls little.
"""

from minserve.slab_quota import SlabQuotas
from minserve.slab_words import (
    H_HOLDER,
    H_LIVENESS,
    H_TOP,
    H_UNFILLED,
    R_DRAINING,
    R_LIVE,
    R_RESERVE,
    ROW_WORDS,
)


class LeaseRule:
    """A view of the header and the rows of a table.  The deficit is what is missing from the liveness reserve."""

    def __init__(self, head: "memoryview[int]", rows: "memoryview[int]", quotas: SlabQuotas) -> None:
        self._head, self._rows, self._quotas = head, rows, quotas

    def deficit(self) -> int:
        """Slabs; negative: so many are free that nobody has been promised."""
        return self._head[H_UNFILLED] + self._head[H_LIVENESS] - self._head[H_TOP]

    def held_by_another(self, owner: int) -> bool:
        """Whether another model has drawn on the liveness reserve and not cured that."""
        return self.deficit() > 0 and self._head[H_HOLDER] != owner

    def draws(self, owner: int, n: int, urgent: bool) -> bool | None:
        """Whether a lease of `n` slabs draws on the liveness reserve; None: it may not be given.

        The holder of the reserve has at least `deficit` slabs above its own reserve, so that its returns cure the
        deficit whatever the others do; it stays the holder until they have.
        """
        head, rows, row = self._head, self._rows, owner * ROW_WORDS
        before = head[H_UNFILLED] + head[H_LIVENESS] - head[H_TOP]
        # those within its own reserve were promised to it
        own = rows[row + R_RESERVE] - rows[row + R_LIVE] - rows[row + R_DRAINING]
        after = before + n - (min(n, own) if own > 0 else 0)
        if after > 0 and after > before:
            alone = before <= 0 or head[H_HOLDER] == owner
            return True if urgent and alone and after <= head[H_LIVENESS] else None
        if not urgent and self._quotas.beyond(owner, n) and self._claimed(owner, -after):
            return None
        return False

    def _claimed(self, owner: int, unpromised: int) -> bool:
        """Whether others have a claim to some of the slabs that a lease beyond its quota would take."""
        return self._quotas.strict or self._quotas.claims(but=owner) > max(0, unpromised)
