"""The sampler's kernels: no sort, no float sums; a token depends on its own row alone, bit for bit.

Weights are exp2((x - max) * log2(e) / t) in fixed point, 40 bits after the point: sums are exact in any order.  A
filter keeps a prefix of the order (x falling, index rising), so it is one border value x* and a number of ties at it.
`_best_kernel`, a block of the vocabulary a program, finds maxima; `_weigh_kernel` sums weights and lists each block's
most likely tokens; `_choose_kernel`, a row a program, bisects for x* over the lists, or over the whole row where they
do not reach far enough, and inverts the cumulative distribution in the order of the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import GpuFacts, cdiv, gpu_facts, launch
from kernels.quant_rows import row_unit
from kernels.table import tuned

# columns of `asks`
TEMPERATURE, TOP_K, TOP_P, MIN_P, UNIFORM = range(5)
LEVELS = tl.constexpr(32)  # powers of two below the largest weight that lists tell apart; the last is "less"
NO_KEY = tl.constexpr(-2139095041)  # the key of -inf


@dataclass(frozen=True)
class SampleConfig:
    """`block`: vocabulary entries a program; `listed`: how many of them it hands on at most."""

    block: int
    listed: int
    num_warps: int

    @classmethod
    def pick(cls, gpu: GpuFacts, vocab: int) -> "SampleConfig":
        return tuned(cls, "sample", gpu, V=vocab) or cls(block=4096, listed=256, num_warps=8)

    @classmethod
    def candidates(cls, gpu: GpuFacts, vocab: int) -> Iterator["SampleConfig"]:
        for block in (2048, 4096, 8192):
            for listed in (128, 256, 512):
                for num_warps in (4, 8, 16):
                    yield cls(block, listed, num_warps)


@triton.jit
def order_key(x):
    """An integer in the order of the floats."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_value(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_logits(p_x, i_c, n, CHUNK: tl.constexpr):
    """Chunk i_c of n logits and its offsets; NaN and inf as 0, -inf past the end."""
    o_x = i_c * CHUNK + tl.arange(0, CHUNK)
    b_x = tl.load(p_x + o_x, mask=o_x < n, other=float("-inf"))
    # + 0.0 makes -0.0 its equal in `order_key` too
    return o_x, tl.where((b_x != b_x) | (b_x == float("inf")), 0.0, b_x + 0.0)


@triton.jit
def weigh(b_x, top, per_t, min_p):
    b_w = tl.exp2((b_x - top) * per_t)
    return (tl.where(b_w >= min_p, b_w, 0.0) * 1099511627776.0 + 0.5).to(tl.int64)


@triton.jit
def level_of(b_x, b_w, top, per_t):
    """How many powers of two below the largest weight; the last level for what has none."""
    b_level = tl.minimum((top - b_x) * per_t, LEVELS - 1.0).to(tl.int32)
    return tl.where(b_w > 0, b_level, LEVELS - 1)


@triton.jit
def ceiling(x):
    whole = x.to(tl.int64)
    return whole + (whole.to(tl.float64) < x).to(tl.int64)


@triton.jit(do_not_specialize=["stride_xr"])
def _best_kernel(
    part_max, part_arg, logits, stride_xr, UNIT: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest logit of a block and where it is; ~where if the block holds NaN or inf."""
    i_r = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1)
    i_part = i_r * tl.num_programs(1) + i_b
    o_v = i_b * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(logits + i_r * stride_xr * UNIT + o_v, mask=o_v < V, other=float("-inf"))
    m_bad = (b_x != b_x) | (b_x == float("inf"))
    b_x = tl.where(m_bad, 0.0, b_x)
    b_max = tl.max(b_x, 0) + 0.0
    b_arg = tl.min(tl.where(b_x == b_max, o_v, V - 1), 0)
    tl.store(part_max + i_part, b_max)
    tl.store(part_arg + i_part, tl.where(tl.max(m_bad.to(tl.int32), 0) > 0, ~b_arg, b_arg))


@triton.jit(do_not_specialize=["stride_xr"])
def _weigh_kernel(
    part_mass,
    part_level,
    list_x,
    list_i,
    logits,
    asks,
    part_max,
    stride_xr,
    UNIT: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The mass of a block; for a row with a filter its list, complete down to `part_level`, in index order."""
    i_r = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1)
    num_parts = tl.num_programs(1)
    i_part = i_r * num_parts + i_b
    temperature = tl.load(asks + i_r * 5)
    if temperature > 0:
        top_k = tl.load(asks + i_r * 5 + 1)
        top_p = tl.load(asks + i_r * 5 + 2)
        min_p = tl.load(asks + i_r * 5 + 3)
        per_t = 1.4426950408889634 / temperature
        o_b = tl.arange(0, PARTS)
        top = tl.max(tl.load(part_max + i_r * num_parts + o_b, mask=o_b < num_parts, other=float("-inf")), 0)
        top = tl.where(top == float("-inf"), 0.0, top)
        o_v, b_x = load_logits(logits + i_r * stride_xr * UNIT, i_b, V, BLOCK)
        b_w = weigh(b_x, top, per_t, min_p)
        tl.store(part_mass + i_part, tl.sum(b_w, 0))
        if ((top_k > 0) & (top_k < V)) | (top_p < 1):
            b_level = level_of(b_x, b_w, top, per_t)
            b_count = tl.cumsum(tl.histogram(b_level, LEVELS), 0)
            o_level = tl.arange(0, LEVELS)
            level = tl.sum(((b_count <= LISTED) & (o_level < LEVELS - 1)).to(tl.int32), 0) - 1
            m_list = b_level <= level
            o_list = i_part * LISTED + tl.cumsum(m_list.to(tl.int32), 0) - 1
            tl.store(list_x + o_list, b_x, mask=m_list)
            tl.store(list_i + o_list, o_v, mask=m_list)
            o_rest = tl.arange(0, LISTED)
            b_rest = tl.full([LISTED], float("-inf"), tl.float32)
            used = tl.sum(m_list.to(tl.int32), 0)
            tl.store(list_x + i_part * LISTED + o_rest, b_rest, mask=o_rest >= used)
            tl.store(part_level + i_part, level)


@triton.jit
def reach_of_lists(p_x, n, level, top, per_t, min_p, CHUNK: tl.constexpr):
    """Count, mass and smallest logit of the listed tokens down to `level`, to which all lists are complete."""
    count = tl.full([], 0, tl.int64)
    mass = tl.full([], 0, tl.int64)
    least = tl.full([], float("inf"), tl.float32)
    for i_c in range(tl.cdiv(n, CHUNK)):
        _, b_x = load_logits(p_x, i_c, n, CHUNK)
        b_w = weigh(b_x, top, per_t, min_p)
        m_x = level_of(b_x, b_w, top, per_t) <= level
        count += tl.sum(m_x.to(tl.int64), 0)
        mass += tl.sum(tl.where(m_x, b_w, 0), 0)
        least = tl.minimum(least, tl.min(tl.where(m_x, b_x, float("inf")), 0))
    return count, mass, least


@triton.jit
def find_border(p_x, n, low, high, bound, top, per_t, min_p, BY_MASS: tl.constexpr, CHUNK: tl.constexpr):
    """The smallest x with less than `bound` above it, and what is above: tokens, or their mass.

    low and high are keys: at or above `bound` (or everything) beyond the one, less beyond the other.  Both ends move
    on to the next logit there is, so that the search ends when one is left between them.
    """
    above = tl.full([], 0, tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        key = middle.to(tl.int32)
        b_beyond = tl.zeros([CHUNK], tl.int64)
        b_next = tl.full([CHUNK], 0x7FFFFFFF, tl.int32)
        b_last = tl.full([CHUNK], NO_KEY, tl.int32)
        for i_c in range(tl.cdiv(n, CHUNK)):
            _, b_x = load_logits(p_x, i_c, n, CHUNK)
            b_w = weigh(b_x, top, per_t, min_p)
            if not BY_MASS:
                b_w = (b_w > 0).to(tl.int64)
            b_key = order_key(b_x)
            m_beyond = b_key > key
            b_beyond += tl.where(m_beyond, b_w, 0)
            b_next = tl.minimum(b_next, tl.where(m_beyond, b_key, 0x7FFFFFFF))
            b_last = tl.maximum(b_last, tl.where(m_beyond, NO_KEY, b_key))
        beyond = tl.sum(b_beyond, 0)
        less = beyond < bound
        above = tl.where(less, beyond, above)
        high = tl.where(less, tl.maximum(tl.max(b_last, 0).to(tl.int64), low + 1), high)
        low = tl.where(less, low, tl.min(b_next, 0).to(tl.int64) - 1)
    return key_value(high), above


@triton.jit
def measure_border(p_x, n, border, top, per_t, min_p, CHUNK: tl.constexpr):
    """The mass above the border; how many tokens are at it, and the weight of one."""
    above = tl.full([], 0, tl.int64)
    ties = tl.full([], 0, tl.int64)
    tie_w = tl.full([], 0, tl.int64)
    for i_c in range(tl.cdiv(n, CHUNK)):
        _, b_x = load_logits(p_x, i_c, n, CHUNK)
        b_w = weigh(b_x, top, per_t, min_p)
        b_tie = tl.where(b_x == border, b_w, 0)
        above += tl.sum(tl.where(b_x > border, b_w, 0), 0)
        ties += tl.sum((b_tie > 0).to(tl.int64), 0)
        tie_w = tl.maximum(tie_w, tl.max(b_tie, 0))
    return above, ties, tie_w


@triton.jit
def find_chunk(p_x, n, border, kept, tie_w, point, top, per_t, min_p, CHUNK: tl.constexpr):
    """The chunk in which the kept mass passes `point`, and the mass and the ties before it."""
    i_at = tl.full([], 0, tl.int32)
    mass = tl.full([], 0, tl.int64)
    ties = tl.full([], 0, tl.int64)
    mass_before = mass
    ties_before = ties
    for i_c in range(tl.cdiv(n, CHUNK)):
        _, b_x = load_logits(p_x, i_c, n, CHUNK)
        b_w = weigh(b_x, top, per_t, min_p)
        tied = tl.sum(((b_x == border) & (b_w > 0)).to(tl.int64), 0)
        taken = tl.minimum(tl.maximum(kept - ties, 0), tied)
        mass += tl.sum(tl.where(b_x > border, b_w, 0), 0) + taken * tie_w
        ties += tied
        over = mass <= point
        i_at = tl.where(over, i_c + 1, i_at)
        mass_before = tl.where(over, mass, mass_before)
        ties_before = tl.where(over, ties, ties_before)
    return i_at, mass_before, ties_before


@triton.jit(do_not_specialize=["stride_xr"])
def _choose_kernel(
    tokens,
    broken,
    logits,
    asks,
    part_max,
    part_arg,
    part_mass,
    part_level,
    list_x,
    list_i,
    stride_xr,
    UNIT: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    IS_GREEDY: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    o_b = tl.arange(0, PARTS)
    m_b = o_b < NUM_PARTS
    b_max = tl.load(part_max + i_r * NUM_PARTS + o_b, mask=m_b, other=float("-inf"))
    b_arg = tl.load(part_arg + i_r * NUM_PARTS + o_b, mask=m_b, other=V - 1)
    top = tl.max(b_max, 0)
    m_bad = b_arg < 0
    b_arg = tl.where(m_bad, ~b_arg, b_arg)
    token = tl.min(tl.where(b_max == top, b_arg, V - 1), 0)
    is_broken = (tl.max(m_bad.to(tl.int32), 0) > 0) | (top == float("-inf"))
    tl.store(broken + i_r, is_broken.to(tl.uint8))
    if not IS_GREEDY:
        temperature = tl.load(asks + i_r * 5)
        if (temperature > 0) & (top > float("-inf")):
            top_k = tl.load(asks + i_r * 5 + 1).to(tl.int64)
            top_p = tl.load(asks + i_r * 5 + 2)
            min_p = tl.load(asks + i_r * 5 + 3)
            per_t = 1.4426950408889634 / temperature
            has_k = (top_k > 0) & (top_k < V)
            p_x = logits + i_r * stride_xr * UNIT
            n = tl.full([], V, tl.int32)
            b_mass = tl.load(part_mass + i_r * NUM_PARTS + o_b, mask=m_b, other=0)
            total = tl.sum(b_mass, 0)
            is_listed = top > float("inf")
            border = tl.full([], float("-inf"), tl.float32)
            kept = tl.full([], 0, tl.int64)
            tie_w = kept
            if has_k | (top_p < 1):
                level = tl.min(tl.load(part_level + i_r * NUM_PARTS + o_b, mask=m_b, other=LEVELS), 0)
                p_list = list_x + i_r * NUM_PARTS * LISTED
                count, mass, least = reach_of_lists(
                    p_list, NUM_PARTS * LISTED, level, top, per_t, min_p, BLOCK
                )
                wanted = ceiling(top_p.to(tl.float64) * total.to(tl.float64))
                is_listed = ((count >= top_k) & has_k) | ((mass >= wanted) & (not has_k))
                low = tl.full([], NO_KEY, tl.int64)
                if is_listed:
                    p_x = p_list
                    n = tl.full([], NUM_PARTS * LISTED, tl.int32)
                    low = order_key(least).to(tl.int64) - 1
                high = order_key(top).to(tl.int64)
                if has_k:
                    border, ahead = find_border(p_x, n, low, high, top_k, top, per_t, min_p, False, BLOCK)
                    above, ties, tie_w = measure_border(p_x, n, border, top, per_t, min_p, BLOCK)
                    kept = tl.minimum(top_k - ahead, ties)
                    total = above + kept * tie_w
                    low = order_key(border).to(tl.int64) - 1
                if top_p < 1:
                    wanted = tl.maximum(ceiling(top_p.to(tl.float64) * total.to(tl.float64)), 1)
                    border, ahead = find_border(p_x, n, low, high, wanted, top, per_t, min_p, True, BLOCK)
                    above, ties, tie_w = measure_border(p_x, n, border, top, per_t, min_p, BLOCK)
                    kept = tl.minimum((wanted - ahead + tie_w - 1) // tl.maximum(tie_w, 1), ties)
                    total = above + kept * tie_w
            uniform = tl.load(asks + i_r * 5 + 4).to(tl.float64)
            point = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
            if has_k | (top_p < 1):
                i_at, mass_before, ties_before = find_chunk(
                    p_x, n, border, kept, tie_w, point, top, per_t, min_p, BLOCK
                )
            else:
                m_over = tl.cumsum(b_mass, 0) <= point
                i_at = tl.sum(m_over.to(tl.int32), 0)
                mass_before = tl.sum(tl.where(m_over, b_mass, 0), 0)
                ties_before = tl.full([], 0, tl.int64)
            o_x, b_x = load_logits(p_x, i_at, n, BLOCK)
            b_w = weigh(b_x, top, per_t, min_p)
            m_tie = (b_x == border) & (b_w > 0)
            b_tied = ties_before + tl.cumsum(m_tie.to(tl.int64), 0)
            b_w = tl.where((b_x > border) | (m_tie & (b_tied <= kept)), b_w, 0)
            at = tl.min(tl.where(mass_before + tl.cumsum(b_w, 0) > point, o_x, n - 1), 0)
            token = at
            if is_listed:
                token = tl.load(list_i + i_r * NUM_PARTS * LISTED + at)
    tl.store(tokens + i_r, token.to(tl.int64))


def sample_rows_triton(
    logits_RV: Tensor, asks_R5: Tensor | None, config: SampleConfig | None = None
) -> tuple[Tensor, Tensor]:
    R, V = logits_RV.shape
    assert logits_RV.dtype == torch.float32, f"{logits_RV.dtype=}"
    assert logits_RV.stride(-1) == 1, f"{logits_RV.stride()=}"
    c = config or SampleConfig.pick(gpu_facts(logits_RV.device), V)
    parts, unit = cdiv(V, c.block), row_unit(logits_RV)

    def scratch(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(R, *shape, dtype=dtype, device=logits_RV.device)

    tokens_R, broken_R = scratch(torch.int64), scratch(torch.uint8)
    if not R:
        return tokens_R, broken_R.view(torch.bool)
    part_max, part_arg = scratch(torch.float32, parts), scratch(torch.int32, parts)
    stride = logits_RV.stride(0) // unit
    sizes = {"UNIT": unit, "V": V, "BLOCK": c.block}
    # products and sums stay apart: the same weight for the same logit in every kernel
    options = {"num_warps": c.num_warps, "enable_fp_fusion": False}
    launch(_best_kernel, (R, parts), part_max, part_arg, logits_RV, stride, **sizes, **options)
    greedy = asks_R5 is None
    asks = part_max if asks_R5 is None else asks_R5
    part_mass, part_level, list_x, list_i = part_max, part_arg, part_max, part_arg
    sizes |= {"LISTED": c.listed, "PARTS": triton.next_power_of_2(parts)}
    if not greedy:
        part_mass, part_level = scratch(torch.int64, parts), scratch(torch.int32, parts)
        list_x = scratch(torch.float32, parts * c.listed)
        list_i = scratch(torch.int32, parts * c.listed)
        outputs = (part_mass, part_level, list_x, list_i)
        launch(_weigh_kernel, (R, parts), *outputs, logits_RV, asks, part_max, stride, **sizes, **options)
    launch(
        _choose_kernel,
        (R,),
        tokens_R,
        broken_R,
        logits_RV,
        asks,
        part_max,
        part_arg,
        part_mass,
        part_level,
        list_x,
        list_i,
        stride,
        NUM_PARTS=parts,
        IS_GREEDY=greedy,
        **sizes,
        **options,
    )
    return tokens_R, broken_R.view(torch.bool)
