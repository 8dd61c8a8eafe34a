"""What a model entry means on a device: every `auto` filled in, and the shape the pool is planned with.

Reads config.json, no weights, and needs no torch: the agent plans the pool of a GPU before any worker starts.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from kernels.kv_layout import CODE_BITS, MAX_BLOCK_TOKENS, KvLayout
from minserve.config import KV_DTYPE, GpuConfig, ModelEntry
from minserve.kv_use import KvUse
from minserve.model_config import LlamaConfig
from minserve.overrides import matches
from minserve.schema import At, refuse, show
from minserve.tensor_names import tensor_names
from quant.formats.kv_scheme import declared
from sched.slabs import MAX_SLAB_BYTES, ModelShape, PoolPlan, solve

# a step's tables must serve every layer: those of codes have a scratch, that of fp8 not always
PLANNED_BY = ("fp32", "bf16", "fp16", "fp8", "int8", "int4z", "int4")
SHORT_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """`dtype` and `layout.fmt` are short names (fp32, bf16, fp16, fp8, int8, int4, int4z); lengths in tokens.

    `layouts`: of every layer, where they differ; `layout` is that which steps are planned with, then one with codes.
    """

    entry: ModelEntry
    config: LlamaConfig
    dtype: str
    quantization: str
    layout: KvLayout
    kv: KvUse
    max_model_len: int
    layouts: tuple[KvLayout, ...] = ()

    @property
    def kv_formats(self) -> str:
        """For people: the format, or each with its number of layers."""
        counts = Counter(layout.fmt for layout in self.layouts)
        return ", ".join(f"{fmt} ({n} layers)" for fmt, n in counts.items()) or self.layout.fmt

    @property
    def shape(self) -> ModelShape:
        """What the pool needs to know of the model."""
        layer_bytes = tuple(layout.block_bytes for layout in self.layouts)
        return ModelShape(
            name=self.entry.name,
            layers=self.config.num_layers,
            block_bytes=max(layer_bytes, default=self.layout.block_bytes),
            layer_bytes=layer_bytes,
            block_tokens=self.layout.block_tokens,
            max_model_len=self.max_model_len,
            reserve_tokens=min(self.entry.reserve_tokens, self.max_model_len),
        )

    @property
    def open_shape(self) -> ModelShape:
        """The same with the smaller blocks that the kernels take too, where the configuration leaves the choice."""
        layout, others = self.layout, []
        free = self.entry.kv_block_tokens is None and not self.layouts
        tokens = layout.block_tokens // 2 if free else 0
        while tokens >= layout.least_block_tokens:
            others.append((tokens, dataclasses.replace(layout, block_tokens=tokens).block_bytes))
            tokens //= 2
        return dataclasses.replace(self.shape, others=tuple(others))

    def with_blocks(self, tokens: int) -> "ResolvedModel":
        """The same with blocks of so many tokens, which its entry then says too."""
        entry = dataclasses.replace(self.entry, kv_block_tokens=tokens)
        return dataclasses.replace(
            self,
            entry=entry,
            layout=dataclasses.replace(self.layout, block_tokens=tokens),
            layouts=tuple(dataclasses.replace(layout, block_tokens=tokens) for layout in self.layouts),
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
    formats = layer_formats(entry, fmt, config.num_layers)
    for name, asked in (("kv_dtype", {fmt}), ("kv_dtype_overrides", set(formats))):
        if wrong := sorted(f for f in asked if f in SHORT_DTYPE.values() and f != dtype):
            choices = ", ".join(("auto", dtype, *CODE_BITS))
            raise ValueError(f"models[{entry.name}].{name} must be one of {choices}, got {wrong[0]!r}")
    check_attention(entry, dtype, formats)
    window = longest_window(config)
    max_model_len = entry.max_model_len or config.max_position_embeddings
    if max_model_len > window:
        raise ValueError(
            f"models[{entry.name}].max_model_len must be at most the checkpoint's {window}, got {max_model_len}"
        )
    layouts = [KvLayout(f, config.num_kv_heads, config.head_dim) for f in formats]
    least = max(layout.least_block_tokens for layout in layouts)
    tokens = entry.kv_block_tokens or max(least, min(layout.block_tokens for layout in layouts))
    if tokens < least or tokens & (tokens - 1):
        says = f"auto or a power of two from {least} to {MAX_BLOCK_TOKENS} with kv_dtype {', '.join(dict.fromkeys(formats))}"
        raise refuse(At(f"models[{entry.name}].kv_block_tokens", Path()), says, tokens)
    layouts = [dataclasses.replace(layout, block_tokens=tokens) for layout in layouts]
    return ResolvedModel(
        entry=entry,
        config=config,
        dtype=dtype,
        quantization=entry.quantization,
        layout=max(layouts, key=lambda layout: PLANNED_BY.index(layout.fmt)),
        layouts=tuple(layouts) if len(set(layouts)) > 1 else (),
        kv=KvUse(fmt, own, static=auto and own is not None and own.static),
        max_model_len=max_model_len,
    )


def layer_formats(entry: ModelEntry, fmt: str, num_layers: int) -> tuple[str, ...]:
    """The KV format of each layer: that of the first override that matches its name, else `fmt`."""
    unused = dict.fromkeys(pattern for pattern, _ in entry.kv_dtype_overrides)
    formats = []
    for i in range(num_layers):
        found = [(p, own) for p, own in entry.kv_dtype_overrides if matches(p, f"model.layers.{i}")]
        for pattern, _ in found:
            unused.pop(pattern, None)
        formats.append(KV_DTYPE.read(At("", Path()), found[0][1]) if found else fmt)
    if unused:
        raise ValueError(
            f"models[{entry.name}].kv_dtype_overrides must match layers, named model.layers.0 to "
            f"model.layers.{num_layers - 1}, got {', '.join(map(repr, unused))}, which match none"
        )
    return tuple(fmt if own == "auto" else own for own in formats)


def check_attention(entry: ModelEntry, dtype: str, formats: tuple[str, ...]) -> None:
    """ValueError for kinds of attention that no device has a kernel for in any layer."""
    at, fmt = At(f"models[{entry.name}]", Path()), ", ".join(dict.fromkeys(formats))
    if entry.int8_qk and (not {"int8", "int4", "int4z"} & set(formats) or dtype == "fp32"):
        says = f"false unless kv_dtype is int8, int4 or int4z, here {fmt}, and dtype not fp32, here {dtype}"
        raise refuse(at.sub("int8_qk"), says, True)
    if entry.fp8_prefill and (not {"fp8", "int4"} & set(formats) or entry.deterministic):
        says = f"false unless kv_dtype is fp8 or int4, here {fmt}, and deterministic false, here {show(entry.deterministic)}"
        raise refuse(at.sub("fp8_prefill"), says, True)


def plan_pool(models: list[ResolvedModel], gpu: GpuConfig, size: int) -> PoolPlan:
    """The pool of `size` bytes that these models share; ValueError where they do not fit into it."""
    return solve([m.shape for m in models], size, max_slab_bytes=gpu.slab_bytes or MAX_SLAB_BYTES)


def check_planned(model: ResolvedModel, plan: PoolPlan) -> None:
    """ValueError where the model's files are not those that its place in the pool was planned for."""
    shape, planned = model.shape, plan.models[model.entry.name]
    found = (shape.layers, shape.block_tokens, sum(shape.layer_bytes) or shape.layers * shape.block_bytes)
    blocks = sum(g.layers * g.block_bytes for g in planned.groups)
    wanted = (sum(g.layers for g in planned.groups), planned.block_tokens, blocks)
    if found != wanted:
        raise ValueError(
            f"model {model.entry.name} now has (layers, tokens of a block, bytes of a block) {found}, its pool was planned "
            f"for {wanted}: restart the server to serve the changed files in {model.entry.path}"
        )


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
