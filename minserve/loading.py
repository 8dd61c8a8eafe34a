"""From a resolved model to a running engine: weights, then the pool, then the Batcher and the Runner over both.

`start_engine` is what a worker process and the LLM class have in common; `LocalEngine` adds a pool of its own.
"""

import dataclasses
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import backend
from kernels.launch import gpu_facts
from kernels.prefill_fp8 import WIDEST, takes_fp8
from minserve.cache_identity import cache_identity
from minserve.config import Config, GpuConfig
from minserve.engine import Engine
from minserve.graphs import cuda_capture
from minserve.inputs import Join
from minserve.load_report import LoadReport
from minserve.memory import GiB, batch_sizes, workspace
from minserve.models import Llama, build_llama
from minserve.overrides import Overrides
from minserve.pool import LeasedSets, SlabPool
from minserve.resolve import ResolvedModel, host_pool_bytes, plan_pool, resolve_model
from minserve.rope import check_positions, rope_tables
from minserve.runner import Runner
from minserve.sampling import SamplingParams
from minserve.warmup import Sizes, compile_monitor, warm_up
from minserve.weights import WeightSource
from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.limits import Limits
from sched.policies import make_policy
from sched.step import Chunk, Grant, StepPlan

log = logging.getLogger(__name__)
TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    resolved: ResolvedModel
    llama: Llama
    report: LoadReport


def check_cuda(device: str) -> None:
    """ValueError where this machine, or this build of torch, has no such GPU."""
    count = torch.cuda.device_count()
    if torch.device(device).index >= count:
        raise ValueError(
            f"device must be cpu, or one of the {count} GPUs that torch {torch.__version__} sees, got {device!r}"
        )


def check_kernels(resolved: ResolvedModel, device: torch.device) -> None:
    """ValueError where attention of the kind that was asked for has no kernel on this device."""
    entry, on_gpu = resolved.entry, backend.runs_triton(device)
    for name in ("int8_qk", "fp8_prefill"):
        if getattr(entry, name) and not on_gpu:
            raise ValueError(f"models[{entry.name}].{name} must be false on {device}: it is a GPU's")
    if entry.fp8_queries and on_gpu and gpu_facts(device).capability < 89:
        raise ValueError(
            f"models[{entry.name}].fp8_queries must be false: it needs sm_89 or later, got sm_{gpu_facts(device).capability}"
        )
    layouts = resolved.layouts or (resolved.layout,)
    if entry.fp8_prefill and not any(takes_fp8(gpu_facts(device), layout) for layout in layouts):
        raise ValueError(
            f"models[{entry.name}].fp8_prefill must be false: it needs sm_89 or later and a head_dim of at most {WIDEST}, "
            f"got sm_{gpu_facts(device).capability} and {resolved.layout.head_dim}"
        )


def load_model(resolved: ResolvedModel, device: str) -> LoadedModel:
    """Reads and prepares all weights; ValueError names a tensor that is missing, left over or of the wrong shape."""
    if device.startswith("cuda"):
        check_cuda(device)
        torch.cuda.set_device(device)  # kernels launch on the current device
    check_kernels(resolved, torch.device(device))
    config, entry = resolved.config, resolved.entry
    room = torch.cuda.mem_get_info(device)[1] // 4 if device.startswith("cuda") else host_pool_bytes()
    check_positions(config, resolved.max_model_len, 2 * entry.max_num_seqs, room)
    with WeightSource(
        entry.path,
        dtype=TORCH_DTYPE[resolved.dtype],
        device=device,
        quantization=resolved.quantization,
        overrides=Overrides(entry.quantization_overrides, entry.quantization_group_size),
        quantization_config=config.quantization,
        lm_head=entry.lm_head,
    ) as source:
        llama = build_llama(config, source, rope_tables(config, 1, device), resolved.kv, resolved.layouts)
    # the whole tables once the weights are there: a damaged checkpoint must not cost seconds and gigabytes first
    llama = dataclasses.replace(llama, rope=rope_tables(config, resolved.max_model_len, device))
    llama = dataclasses.replace(
        llama, int8_qk=entry.int8_qk, fp8_prefill=entry.fp8_prefill, fp8_queries=entry.fp8_queries
    )
    return LoadedModel(resolved, llama, source.report)


def warm(model: LoadedModel, device: str) -> int:
    """Before the pool is there: on a GPU, compiles and takes the memory that the largest steps need.  Returns the bytes
    that torch held before, the weights."""
    if not device.startswith("cuda"):
        return 0
    r = model.resolved
    torch.cuda.empty_cache()  # of what loading alone needed
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    sizes = Sizes(r.entry.max_num_seqs, r.entry.max_num_batched_tokens, r.max_model_len)
    warm_up(model.llama, r.layout, sizes, torch.device(device), deterministic=r.entry.deterministic)
    return before


def start_engine(model: LoadedModel, sets: LeasedSets, *, overlap: bool | None = None) -> Engine:
    """An engine that takes its blocks from `sets`, of a model that is warm.

    `overlap` None: on a GPU.  A CPU has nothing to hide, and a second thread with OpenMP's behind it makes libgomp
    throttle all of them: decode at batch 1 fell from 56 to 36 tokens/s (docs/log.md).
    """
    overlap = sets.pool.bytes.is_cuda if overlap is None else overlap
    r = model.resolved
    blocks = BlockPool(sets, sets.shape.slots, r.layout.block_tokens)
    limits = Limits(
        max_running=r.entry.max_num_seqs,
        max_step_tokens=r.entry.max_num_batched_tokens,
        max_chunk_tokens=r.entry.max_num_batched_tokens,
        max_model_len=r.max_model_len,
        max_waiting=r.entry.max_queued_requests,
    )
    runner = Runner(
        model.llama,
        r.layout,
        sets,
        # a request that ends holds its row until the step after next
        max_rows=2 * r.entry.max_num_seqs,
        max_model_len=r.max_model_len,
        deterministic=r.entry.deterministic,
        overlap=overlap,
    )
    if runner.on_gpu:
        if r.entry.cuda_graphs and not r.entry.deterministic:
            runner.capture(batch_sizes(limits.max_running), cuda_capture())
        compile_monitor().serving = True
    policy = make_policy(r.entry.policy, limits, None, dict(r.entry.policy_options))
    batcher = Batcher(blocks, limits, policy=policy)
    return Engine(
        runner,
        batcher,
        eos_ids=r.config.eos_ids,
        max_model_len=r.max_model_len,
        overlap=overlap,
        seed=r.entry.seed,
        identity=cache_identity(r) if r.entry.enable_prefix_caching else None,
    )


def device_pool_bytes(model: LoadedModel, gpu: GpuConfig, before: int) -> int:
    """What a pool may take now that the model is warm: of a GPU what is free within its fraction, less what the model
    may still take of its workspace; of a host a quarter of what is available."""
    if not gpu.device.startswith("cuda"):
        return host_pool_bytes()
    free, total = torch.cuda.mem_get_info(gpu.device)
    held = torch.cuda.memory_reserved(gpu.device) - before
    left = max(0, workspace(model.resolved).torch_bytes - held)
    return max(0, free - int(total * (1 - gpu.memory_fraction)) - left)


def memory_line(model: LoadedModel, device: str, before: int) -> str:
    """What was planned on a GPU beside weights and pool, and what the started engine has held so far; torch held `before`
    without it."""
    planned = workspace(model.resolved)
    held = torch.cuda.max_memory_reserved(device) - before
    line = (
        f"GPU memory beside weights, pool and CUDA's own: {held / GiB:.2f} GiB held after warm-up and capture, "
        f"{planned.torch_bytes / GiB:.2f} planned ({planned} GiB)"
    )
    if held > planned.torch_bytes:
        log.warning("%s: more than was planned; a lower memory_fraction leaves room for it", line)
    return line


@dataclass(slots=True)
class LocalEngine:
    """One model with a pool of its own in this process."""

    resolved: ResolvedModel
    engine: Engine
    pool: SlabPool
    sets: LeasedSets
    report: LoadReport

    @classmethod
    def start(cls, config: Config, *, overlap: bool | None = None) -> "LocalEngine":
        entry, gpu = config.models[0], config.gpus[0]
        resolved = resolve_model(entry, gpu.device)
        model = load_model(resolved, gpu.device)
        before = warm(model, gpu.device)
        size = gpu.pool_bytes or device_pool_bytes(model, gpu, before)
        plan = plan_pool([resolved], gpu, size)
        pool = SlabPool.create(plan, gpu.device)
        sets = LeasedSets(pool, entry.name)
        engine = start_engine(model, sets, overlap=overlap)
        if engine.runner.on_gpu:
            log.info(memory_line(model, gpu.device, before + pool.bytes.nbytes))
        return cls(resolved, engine, pool, sets, model.report)

    def logits(self, token_ids: tuple[int, ...]) -> Tensor:
        """fp32 logits [T, V] of one sequence, in chunks of the size the engine itself would take."""
        if not 0 < len(token_ids) <= self.resolved.max_model_len:
            raise ValueError(f"logits needs 1 to {self.resolved.max_model_len} tokens, got {len(token_ids)}")
        vocab = self.resolved.config.vocab_size
        if not 0 <= min(token_ids) <= max(token_ids) < vocab:
            raise ValueError(f"token ids must be in [0, {vocab}), got {min(token_ids)} to {max(token_ids)}")
        blocks = self.engine.batcher.blocks
        held = blocks.allocate(self.resolved.layout.blocks_for(len(token_ids)), urgent=True)
        if held is None:
            raise ValueError(f"the pool has no room for {len(token_ids)} tokens")
        rid, size = -1, self.resolved.entry.max_num_batched_tokens
        joins = (Join(rid, token_ids, len(token_ids), SamplingParams(), 0, ()),)
        grants = (Grant(rid, tuple(held)),)
        parts = []
        try:
            for start in range(0, len(token_ids), size):
                chunk = Chunk(rid, start, min(size, len(token_ids) - start), False)
                plan = StepPlan(0, (), (chunk,), grants if start == 0 else (), ())
                parts.append(self.engine.runner.logits(plan, joins if start == 0 else ()))
        finally:
            self.engine.runner.rows.drop((rid,))
            blocks.release(held)
        return torch.cat(parts)

    def close(self) -> None:
        self.engine.close()
        self.engine.batcher.blocks.give_up(self.sets.num_leased)
        self.sets.close()
        self.pool.close()
