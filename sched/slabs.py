"""Pool geometry: how many bytes a slab has, and what each model's slab sets look like in slabs of that size.

Every model draws from one flat list of slabs, so one slab size S serves them all; `solve` picks the S, and where a
shape leaves the choice the tokens P of a block, that leave no tail above MAX_TAIL, or else the least tail there is.
Pure arithmetic on a few ints: it allocates nothing and knows no device.  A set is one slab for each layer, any
slabs; where the layers of a model store blocks of different bytes, as many of the smaller ones as fit share a slab.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sched.step import MAX_SLOTS

PAGE_BYTES = 4096
MAX_SLAB_BYTES = 3 << 20
MIN_SETS = 200  # of the deepest model: fewer, and what a set leaves unused becomes a visible part of the pool
MAX_TAIL = 0.02  # of a slab that no slot covers: below it, the blocks a kernel likes best stay


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a model asks of the pool.  `block_bytes`: the KV of `block_tokens` tokens in one layer, scales included.

    `others` are further blocks, (tokens, bytes) each, that its kernels take too, the best first.  `layer_bytes`: the
    block of each layer where they differ, `block_bytes` being the largest; there is no choice of blocks then.
    """

    name: str
    layers: int
    block_bytes: int
    block_tokens: int
    max_model_len: int
    reserve_tokens: int = 8192
    others: tuple[tuple[int, int], ...] = ()
    layer_bytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in ("layers", "block_bytes", "block_tokens", "max_model_len"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"model {self.name!r}: {field} must be at least 1, got {getattr(self, field)}"
                )
        if self.reserve_tokens < 0:
            raise ValueError(
                f"model {self.name!r}: reserve_tokens must not be negative, got {self.reserve_tokens}"
            )
        if any(tokens < 1 or size < 1 for tokens, size in self.others):
            raise ValueError(
                f"model {self.name!r}: others must be pairs of (tokens, bytes) of at least 1, got {self.others}"
            )
        whole = len(self.layer_bytes) == self.layers and max(self.layer_bytes) == self.block_bytes
        if self.layer_bytes and not (whole and min(self.layer_bytes) > 0 and not self.others):
            raise ValueError(
                f"model {self.name!r}: layer_bytes must be {self.layers} sizes of at most block_bytes="
                f"{self.block_bytes}, one of them that, without others, got {self.layer_bytes}"
            )

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """(tokens, bytes) of every block there is to choose from, the best first."""
        return ((self.block_tokens, self.block_bytes), *self.others)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers `first` to `first + layers` store blocks of `block_bytes`."""

    first: int
    layers: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class SetShape:
    """A slab set of one model: `slots` blocks of every layer in `layers` slabs, one a layer.

    `places`: the slab and the byte in it where each layer's blocks begin, where some share one; `layers` counts slabs
    then.  `reserve_sets` are kept for this model whatever the others do; `max_len_sets` hold its longest sequence.
    """

    layers: int
    groups: tuple[LayerGroup, ...]
    slots: int
    block_tokens: int
    reserve_sets: int
    max_len_sets: int
    tail_waste: float
    places: tuple[tuple[int, int], ...] = ()

    @property
    def set_tokens(self) -> int:
        return self.slots * self.block_tokens


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """`liveness_slabs` are lent to one model at a time, so that a longest sequence can always end."""

    slab_bytes: int
    num_slabs: int
    models: dict[str, SetShape]
    liveness_slabs: int

    @property
    def pool_bytes(self) -> int:
        return self.slab_bytes * self.num_slabs

    @property
    def reserved_slabs(self) -> int:
        return sum(m.reserve_sets * m.layers for m in self.models.values()) + self.liveness_slabs

    def max_sets(self, name: str) -> int:
        """How many sets the model could hold if the others held nothing."""
        return self.num_slabs // self.models[name].layers


def solve(
    shapes: Sequence[ModelShape],
    pool_bytes: int,
    *,
    min_sets: int = MIN_SETS,
    max_slab_bytes: int = MAX_SLAB_BYTES,
) -> PoolPlan:
    """The best slab size (a multiple of 4 KiB) and blocks; ValueError says how large the pool must be.

    From the largest size that leaves `min_sets` downwards, a third at a time: the first third in which no tail is above
    MAX_TAIL, and in it the size with the least tail; where there is none, the least worst tail of all.  Only then are
    blocks tried that are not the best, as few as will do.
    """
    names = [s.name for s in shapes]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"a pool needs models with different names, got {names}")
    plan = _best(shapes, pool_bytes, min_sets, max_slab_bytes, free=False)
    if plan is None or _rank(shapes, plan)[0] > 0:
        plan = _best(shapes, pool_bytes, min_sets, max_slab_bytes, free=True)
    if plan is None:
        need = _least_pool(shapes, pool_bytes, min_sets, max_slab_bytes)
        raise ValueError(
            f"pool_bytes={pool_bytes} is too small for {', '.join(names)}: at least {need} bytes are needed for "
            f"{min_sets} sets and the reserves; give it more, or lower reserve_tokens or max_model_len"
        )
    return plan


def _best(
    shapes: Sequence[ModelShape], pool_bytes: int, min_sets: int, max_slab: int, *, free: bool = True
) -> PoolPlan | None:
    depth = max(s.layers for s in shapes)
    shapes = shapes if free else [replace(s, others=()) for s in shapes]
    blocks = [[size for _, size in s.blocks] for s in shapes]
    low = _round_up(max(map(min, blocks)), PAGE_BYTES)
    high = min(
        max(max_slab, _round_up(max(s.block_bytes for s in shapes), PAGE_BYTES)),
        pool_bytes // (depth * min_sets),
        MAX_SLOTS * min(map(max, blocks)),
    )
    high -= high % PAGE_BYTES
    found: list[tuple[tuple[float, ...], PoolPlan]] = []
    while high >= low:
        # a third of the size is room enough to find a small tail: 2 to 3 MiB where the pool is large
        floor = max(low, _round_up(high * 2 // 3, PAGE_BYTES))
        plans = [_plan(shapes, pool_bytes, S) for S in range(high, floor - 1, -PAGE_BYTES)]
        plans = [p for p in plans if p.reserved_slabs <= p.num_slabs]
        if plans:
            best = min(plans, key=lambda p: _rank(shapes, p))
            found.append((_rank(shapes, best), best))
            if found[-1][0][0] == 0:
                return best
        high = floor - PAGE_BYTES
    return min(found, key=lambda f: f[0])[1] if found else None


def _rank(shapes: Sequence[ModelShape], plan: PoolPlan) -> tuple[float, ...]:
    """Less is better: what a tail exceeds the limit by, models without their best blocks, the worst tail, all tails."""
    tails = [m.tail_waste for m in plan.models.values()]
    others = sum(plan.models[s.name].block_tokens != s.block_tokens for s in shapes)
    return max(0.0, max(tails) - MAX_TAIL), others, round(max(tails), 3), round(sum(tails), 3)


def _plan(shapes: Sequence[ModelShape], pool_bytes: int, slab_bytes: int) -> PoolPlan:
    models = {s.name: _set_shape(s, slab_bytes) for s in shapes}
    liveness = max((m.max_len_sets - m.reserve_sets) * m.layers for m in models.values())
    return PoolPlan(slab_bytes, pool_bytes // slab_bytes, models, liveness)


def _set_shape(shape: ModelShape, slab_bytes: int) -> SetShape:
    """With the best blocks that keep to MAX_TAIL, else with those of the least tail."""
    tails = [(tail_waste(slab_bytes, size), tokens, size) for tokens, size in shape.blocks]
    tail, tokens, size = next((t for t in tails if t[0] <= MAX_TAIL), min(tails, key=lambda t: t[0]))
    slots = min(slab_bytes // size, MAX_SLOTS)
    assert slots, f"a slab of {slab_bytes} bytes holds no block of {shape.name}"
    slabs, places = shape.layers, tuple[tuple[int, int], ...]()
    if shape.layer_bytes:
        slabs, places = _share(shape.layer_bytes, slots, slab_bytes)
        tail = 1 - slots * sum(shape.layer_bytes) / (slabs * slab_bytes)
    return SetShape(
        layers=slabs,
        groups=_runs(shape.layer_bytes or (size,) * shape.layers),
        slots=slots,
        block_tokens=tokens,
        reserve_sets=-(-min(shape.max_model_len, shape.reserve_tokens) // (slots * tokens)),
        max_len_sets=-(-shape.max_model_len // (slots * tokens)),
        tail_waste=tail,
        places=places,
    )


def _share(
    layer_bytes: tuple[int, ...], slots: int, slab_bytes: int
) -> tuple[int, tuple[tuple[int, int], ...]]:
    """How many slabs hold all layers, and where each begins: layers of one size, in their order, fill slab after slab."""
    slabs = 0
    places: dict[int, tuple[int, int]] = {}
    for size in sorted(set(layer_bytes), reverse=True):
        mine = [layer for layer, own in enumerate(layer_bytes) if own == size]
        room = slab_bytes // (slots * size)
        places |= {layer: (slabs + i // room, i % room * slots * size) for i, layer in enumerate(mine)}
        slabs += -(-len(mine) // room)
    return slabs, tuple(places[layer] for layer in range(len(layer_bytes)))


def _runs(layer_bytes: tuple[int, ...]) -> tuple[LayerGroup, ...]:
    """Neighbouring layers of one size as groups."""
    groups: list[LayerGroup] = []
    for layer, size in enumerate(layer_bytes):
        if groups and groups[-1].block_bytes == size:
            groups[-1] = replace(groups[-1], layers=groups[-1].layers + 1)
        else:
            groups.append(LayerGroup(layer, 1, size))
    return tuple(groups)


def tail_waste(slab_bytes: int, block_bytes: int) -> float:
    """The share of a slab that is no slot of so many bytes, 1 where none fits."""
    return 1 - min(slab_bytes // block_bytes, MAX_SLOTS) * block_bytes / slab_bytes


def heads_per_rank(num_kv_heads: int, tp: int) -> int:
    """KV heads that each of `tp` ranks stores: whole heads, and one of its own where ranks outnumber them."""
    if tp < 1 or (num_kv_heads % tp and tp % num_kv_heads):
        raise ValueError(f"tp must divide the {num_kv_heads} KV heads or be a multiple of them, got {tp}")
    return max(1, num_kv_heads // tp)


def _least_pool(shapes: Sequence[ModelShape], too_small: int, min_sets: int, max_slab: int) -> int:
    low, high = max(too_small, 0), max(2 * too_small, 1 << 20)
    while _best(shapes, high, min_sets, max_slab) is None:
        low, high = high, 2 * high
    while high - low > max(PAGE_BYTES, high >> 7):
        middle = (low + high) // 2
        if _best(shapes, middle, min_sets, max_slab) is None:
            low = middle
        else:
            high = middle
    return high


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
