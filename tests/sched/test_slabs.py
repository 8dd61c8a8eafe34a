"""Slab geometry over real shapes, in the numbers of the pool's design, and over toy ones."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sched.slabs import MAX_SLAB_BYTES, MIN_SETS, PAGE_BYTES, ModelShape, PoolPlan, SetShape, solve
from sched.step import MAX_SLOTS

GIB = 1 << 30
# layers, KV heads, head width
LLAMAS = {
    "1B": (16, 8, 64),
    "3B": (28, 8, 128),
    "8B": (32, 8, 128),
    "70B": (80, 8, 128),
    "70B/TP4": (80, 2, 128),
    "2-7B": (32, 32, 128),
    "2-13B": (40, 40, 128),
}


def llama(
    name: str, bits: int, P: int, *, max_model_len: int = 32768, reserve_tokens: int = 8192
) -> ModelShape:
    """Codes of K and V, and an fp16 scale of each per token and head below 16 bits."""
    layers, heads, width = LLAMAS[name]
    block_bytes = heads * (2 * P * width * bits // 8 + (4 * P if bits < 16 else 0))
    return ModelShape(
        name=f"{name}-kv{bits}",
        layers=layers,
        block_bytes=block_bytes,
        block_tokens=P,
        max_model_len=max_model_len,
        reserve_tokens=reserve_tokens,
    )


def assert_sound(plan: PoolPlan, shapes: list[ModelShape], pool_bytes: int, min_sets: int = MIN_SETS) -> None:
    assert plan.slab_bytes % PAGE_BYTES == 0
    assert pool_bytes - plan.slab_bytes < plan.pool_bytes <= pool_bytes
    assert list(plan.models) == [s.name for s in shapes]
    for s in shapes:
        m: SetShape = plan.models[s.name]
        assert plan.max_sets(s.name) >= min_sets
        assert 1 <= m.slots <= MAX_SLOTS
        assert m.slots * s.block_bytes <= plan.slab_bytes
        assert m.tail_waste == pytest.approx(1 - m.slots * s.block_bytes / plan.slab_bytes)
        assert sum(g.layers for g in m.groups) == m.layers == s.layers
        assert m.set_tokens * m.reserve_sets >= min(s.max_model_len, s.reserve_tokens)
        assert m.set_tokens * m.max_len_sets >= s.max_model_len > m.set_tokens * (m.max_len_sets - 1)
        # with every reserve filled, one longest sequence still finds its slabs
        assert m.reserve_sets * m.layers + plan.liveness_slabs >= m.max_len_sets * m.layers
    assert plan.reserved_slabs <= plan.num_slabs


@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.parametrize(("bits", "P"), [(16, 64), (16, 16), (8, 32), (8, 64), (4, 32), (4, 64)])
def test_real_shapes_on_a_gpu(name: str, bits: int, P: int) -> None:
    shape = llama(name, bits, P)
    plan = solve([shape], 60 * GIB)
    assert_sound(plan, [shape], 60 * GIB)
    assert 2 << 20 <= plan.slab_bytes <= 3 << 20
    assert plan.models[shape.name].tail_waste < 0.001


def test_models_of_every_precision_share_a_slab_size() -> None:
    shapes = [llama("8B", 16, 32), llama("8B", 8, 32), llama("70B/TP4", 8, 32), llama("1B", 4, 32)]
    plan = solve(shapes, 60 * GIB)
    assert_sound(plan, shapes, 60 * GIB)
    assert max(m.tail_waste for m in plan.models.values()) < 0.02
    mha = [*shapes, llama("2-7B", 16, 16), llama("2-13B", 8, 32)]
    plan = solve(mha, 60 * GIB)
    assert_sound(plan, mha, 60 * GIB)
    assert max(m.tail_waste for m in plan.models.values()) < 0.05


@pytest.mark.parametrize(
    ("bits", "P", "waste"), [(16, 64, 0.0), (8, 64, 0.048), (8, 32, 0.016), (4, 64, 0.004), (4, 32, 0.004)]
)
def test_tails_at_two_mib(bits: int, P: int, waste: float) -> None:
    """DESIGN section 5: an 8B at S = 2 MiB."""
    shape = llama("8B", bits, P)
    pool = 2 << 20
    plan = solve([shape], MIN_SETS * 32 * pool, max_slab_bytes=pool)
    # solve may find a better size below 2 MiB; at 2 MiB itself the tail is what the design says
    slots = pool // shape.block_bytes
    assert 1 - slots * shape.block_bytes / pool == pytest.approx(waste, abs=0.0035)
    assert plan.models[shape.name].tail_waste <= waste + 1e-9


def test_toy_shapes_get_small_slabs() -> None:
    """The demo: three tiny models in 32 MiB, at least 200 sets each."""
    shapes = [
        ModelShape(name=n, layers=4, block_bytes=b, block_tokens=P, max_model_len=512, reserve_tokens=256)
        for n, b, P in (("fp32", 8192, 16), ("bf16", 8192, 32), ("int8", 4352, 32))
    ]
    plan = solve(shapes, 32 << 20)
    assert_sound(plan, shapes, 32 << 20)
    assert plan.slab_bytes <= (32 << 20) // (4 * MIN_SETS)


@pytest.mark.parametrize("pool_bytes", [0, 1, 1 << 20, 100 << 20])
def test_too_small_a_pool_says_how_much_is_needed(pool_bytes: int) -> None:
    shape = llama("1B", 16, 32)
    with pytest.raises(ValueError, match=r"at least \d+ bytes are needed") as e:
        solve([shape], pool_bytes)
    assert f"pool_bytes={pool_bytes}" in str(e.value)
    assert "1B-kv16" in str(e.value)
    needed = int(str(e.value).split("at least ")[1].split()[0])
    plan = solve([shape], needed)
    assert_sound(plan, [shape], needed)
    with pytest.raises(ValueError, match="too small"):
        solve([shape], int(needed * 0.98))


def test_the_reserves_may_be_what_is_too_large() -> None:
    shapes = [llama("8B", bits, 32, max_model_len=131072, reserve_tokens=131072) for bits in (16, 8, 4)]
    with pytest.raises(ValueError, match="lower reserve_tokens or max_model_len"):
        solve(shapes, 20 * GIB)
    lighter = [llama("8B", bits, 32, max_model_len=131072, reserve_tokens=1024) for bits in (16, 8, 4)]
    assert_sound(solve(lighter, 20 * GIB), lighter, 20 * GIB)


def test_the_liveness_reserve_is_for_the_longest_sequence() -> None:
    short, long = llama("8B", 16, 32, max_model_len=4096), llama("1B", 16, 32, max_model_len=131072)
    plan = solve([short, long], 60 * GIB)
    m = plan.models["1B-kv16"]
    assert plan.models["8B-kv16"].reserve_sets == plan.models["8B-kv16"].max_len_sets
    assert plan.liveness_slabs == (m.max_len_sets - m.reserve_sets) * 16
    assert solve([short], 60 * GIB).liveness_slabs == 0


def test_bad_shapes_raise() -> None:
    good = llama("1B", 16, 32)
    with pytest.raises(ValueError, match="different names"):
        solve([good, good], GIB)
    with pytest.raises(ValueError, match="different names"):
        solve([], GIB)
    for field in ("layers", "block_bytes", "block_tokens", "max_model_len"):
        values = {"layers": 1, "block_bytes": 64, "block_tokens": 16, "max_model_len": 99} | {field: 0}
        with pytest.raises(ValueError, match=f"model 'm': {field} must be at least 1, got 0"):
            ModelShape(name="m", **values)
    with pytest.raises(ValueError, match="reserve_tokens must not be negative, got -1"):
        ModelShape(name="m", layers=1, block_bytes=64, block_tokens=16, max_model_len=9, reserve_tokens=-1)


plans = given(
    models=st.lists(
        st.tuples(
            st.integers(1, 96),
            st.integers(1, 4096),
            st.sampled_from((16, 32, 64)),
            st.integers(1, 5000),
            st.integers(0, 9000),
        ),
        min_size=1,
        max_size=4,
    ),
    pool_kib=st.integers(1, 1 << 20),
    min_sets=st.integers(1, 300),
)


@settings(max_examples=20, deadline=None)
@plans
def test_any_plan_is_sound(models: list[tuple[int, ...]], pool_kib: int, min_sets: int) -> None:
    assert_any_sound(models, pool_kib, min_sets)


def assert_any_sound(models: list[tuple[int, ...]], pool_kib: int, min_sets: int) -> None:
    shapes = [
        ModelShape(
            name=f"m{i}",
            layers=layers,
            block_bytes=16 * units,
            block_tokens=P,
            max_model_len=length,
            reserve_tokens=reserve,
        )
        for i, (layers, units, P, length, reserve) in enumerate(models)
    ]
    pool_bytes = pool_kib << 10
    try:
        plan = solve(shapes, pool_bytes, min_sets=min_sets)
    except ValueError as e:
        needed = int(str(e).split("at least ")[1].split()[0])
        assert needed > pool_bytes
        pool_bytes = needed
        plan = solve(shapes, pool_bytes, min_sets=min_sets)
    assert_sound(plan, shapes, pool_bytes, min_sets)
    assert plan.slab_bytes <= max(MAX_SLAB_BYTES, max(s.block_bytes for s in shapes) + PAGE_BYTES)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@plans
def test_any_of_many_plans_is_sound(models: list[tuple[int, ...]], pool_kib: int, min_sets: int) -> None:
    assert_any_sound(models, pool_kib, min_sets)
