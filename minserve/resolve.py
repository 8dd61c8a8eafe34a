"""What a model entry means on a device: every `auto` filled in, and the shape the pool is planned with.

Reads config.json, no weights, and needs no torch: the agent plans the pool of a GPU before any worker starts.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from kernels.kv_layout import CODE_BITS, MAX_BLOCK_TOKENS, KvLayout
from minserve.config import GpuConfig, ModelEntry
from minserve.kv_use import KvUse
from minserve.model_config import LlamaConfig
from minserve.schema import At, refuse, show
from minserve.tensor_names import tensor_names
from quant.formats.kv_scheme import declared
from sched.slabs import MAX_SLAB_BYTES, ModelShape, PoolPlan, solve

SHORT_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """`dtype` and `layout.fmt` are short names (fp32, bf16, fp16, fp8, int8, int4, int4z); lengths in tokens."""

    entry: ModelEntry
    config: LlamaConfig
    dtype: str
    quantization: str
    layout: KvLayout
    kv: KvUse
    max_model_len: int

    @property
    def shape(self) -> ModelShape:
        """What the pool needs to know of the model."""
        return ModelShape(
            name=self.entry.name,
            layers=self.config.num_layers,
            block_bytes=self.layout.block_bytes,
            block_tokens=self.layout.block_tokens,
            max_model_len=self.max_model_len,
            reserve_tokens=min(self.entry.reserve_tokens, self.max_model_len),
        )

    @property
    def open_shape(self) -> ModelShape:
        """The same with the smaller blocks that the kernels take too, where the configuration leaves the choice."""
        layout, others = self.layout, []
        tokens = layout.block_tokens // 2 if self.entry.kv_block_tokens is None else 0
        while tokens >= layout.least_block_tokens:
            others.append((tokens, dataclasses.replace(layout, block_tokens=tokens).block_bytes))
            tokens //= 2
        return dataclasses.replace(self.shape, others=tuple(others))

    def with_blocks(self, tokens: int) -> "ResolvedModel":
        """The same with blocks of so many tokens, which its entry then says too."""
        entry = dataclasses.replace(self.entry, kv_block_tokens=tokens)
        return dataclasses.replace(
            self, entry=entry, layout=dataclasses.replace(self.layout, block_tokens=tokens)
        )


def resolve_model(entry: ModelEntry, device: str) -> ResolvedModel:
    """Reads the checkpoint's config and decides dtype, KV format and window; ValueError for what cannot be.

    `dtype: auto` is the checkpoint's, but bf16 for fp16 ones on a CPU, whose matmuls have no fast fp16.
    `kv_dtype: auto` is what the checkpoint declares, else the model's dtype.
    """
    config = LlamaConfig.from_folder(entry.path)
    dtype = SHORT_DTYPE[config.dtype] if entry.dtype == "auto" else entry.dtype
    if entry.dtype == "auto" and dtype == "fp16" and device == "cpu":
        dtype = "bf16"
    own = declared(config.quantization, tensor_names(entry.path))
    auto = entry.kv_dtype == "auto"
    fmt = (own.fmt if own else dtype) if auto else entry.kv_dtype
    if fmt in SHORT_DTYPE.values() and fmt != dtype:
        choices = ", ".join(("auto", dtype, *CODE_BITS))
        raise ValueError(f"models[{entry.name}].kv_dtype must be one of {choices}, got {fmt!r}")
    check_attention(entry, dtype, fmt)
    window = longest_window(config)
    max_model_len = entry.max_model_len or config.max_position_embeddings
    if max_model_len > window:
        raise ValueError(
            f"models[{entry.name}].max_model_len must be at most the checkpoint's {window}, got {max_model_len}"
        )
    layout = KvLayout(fmt, config.num_kv_heads, config.head_dim)
    tokens = entry.kv_block_tokens or layout.block_tokens
    if tokens < layout.least_block_tokens or tokens & (tokens - 1):
        says = f"auto or a power of two from {layout.least_block_tokens} to {MAX_BLOCK_TOKENS} with kv_dtype {fmt}"
        raise refuse(At(f"models[{entry.name}].kv_block_tokens", Path()), says, tokens)
    layout = dataclasses.replace(layout, block_tokens=tokens)
    return ResolvedModel(
        entry=entry,
        config=config,
        dtype=dtype,
        quantization=entry.quantization,
        layout=layout,
        kv=KvUse(fmt, own, static=auto and own is not None and own.static),
        max_model_len=max_model_len,
    )


def check_attention(entry: ModelEntry, dtype: str, fmt: str) -> None:
    """ValueError for kinds of attention that no device has a kernel for."""
    at = At(f"models[{entry.name}]", Path())
    if entry.int8_qk and (fmt not in ("int8", "int4", "int4z") or dtype == "fp32"):
        says = f"false unless kv_dtype is int8, int4 or int4z, here {fmt}, and dtype not fp32, here {dtype}"
        raise refuse(at.sub("int8_qk"), says, True)
    if entry.fp8_prefill and (fmt not in ("fp8", "int4") or entry.deterministic):
        says = f"false unless kv_dtype is fp8 or int4, here {fmt}, and deterministic false, here {show(entry.deterministic)}"
        raise refuse(at.sub("fp8_prefill"), says, True)


def plan_pool(models: list[ResolvedModel], gpu: GpuConfig, size: int) -> PoolPlan:
    """The pool of `size` bytes that these models share; ValueError where they do not fit into it."""
    return solve([m.shape for m in models], size, max_slab_bytes=gpu.slab_bytes or MAX_SLAB_BYTES)


def settle_blocks(models: list[ResolvedModel], gpu: GpuConfig, size: int) -> list[ResolvedModel]:
    """The models with the blocks that suit a pool of `size` bytes: the kernel's best unless a tail would be too large.

    To be asked before a worker starts: what it compiles depends on its blocks.
    """
    plan = solve([m.open_shape for m in models], size, max_slab_bytes=gpu.slab_bytes or MAX_SLAB_BYTES)
    return [m.with_blocks(plan.models[m.entry.name].block_tokens) for m in models]


def longest_window(config: LlamaConfig) -> int:
    """Positions the rotary scheme reaches: a stretching one goes `factor` times beyond what it was trained on."""
    rope, trained = config.rope, config.max_position_embeddings
    if rope.rope_type in ("linear", "dynamic"):
        return int(trained * max(1.0, rope.factor or 1.0))
    if rope.rope_type == "yarn" and rope.original_max_position:
        return max(trained, int(rope.original_max_position * (rope.factor or 1.0)))
    return trained


def host_pool_bytes() -> int:
    """A quarter of the memory that is available on this host, at most 4 GiB: pages count only once they are used."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    return min(available // 4, 4 << 30)
