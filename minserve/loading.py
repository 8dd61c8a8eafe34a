"""From a resolved model to a running engine: weights, then the pool, then the Batcher and the Runner over both.

`start_engine` is what a worker process and the LLM class have in common; `LocalEngine` adds a pool of its own.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import backend
from kernels.launch import gpu_facts
from kernels.prefill_fp8 import WIDEST, takes_fp8
from minserve.config import Config
from minserve.engine import Engine
from minserve.graphs import batch_sizes, cuda_capture
from minserve.inputs import Join
from minserve.load_report import LoadReport
from minserve.models import Llama, build_llama
from minserve.overrides import Overrides
from minserve.pool import LeasedSets, SlabPool
from minserve.resolve import ResolvedModel, host_pool_bytes, plan_pool, resolve_model
from minserve.rope import rope_tables
from minserve.runner import Runner
from minserve.sampling import SamplingParams
from minserve.warmup import Sizes, compile_monitor, warm_up
from minserve.weights import WeightSource
from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.limits import Limits
from sched.step import Chunk, Grant, StepPlan

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
    if entry.fp8_prefill and not takes_fp8(gpu_facts(device), resolved.layout):
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
    rope = rope_tables(config, resolved.max_model_len, device)
    with WeightSource(
        entry.path,
        dtype=TORCH_DTYPE[resolved.dtype],
        device=device,
        quantization=resolved.quantization,
        overrides=Overrides(entry.quantization_overrides, entry.quantization_group_size),
        quantization_config=config.quantization,
        lm_head=entry.lm_head,
    ) as source:
        llama = build_llama(config, source, rope, resolved.kv)
    llama = dataclasses.replace(llama, int8_qk=entry.int8_qk, fp8_prefill=entry.fp8_prefill)
    return LoadedModel(resolved, llama, source.report)


def start_engine(model: LoadedModel, sets: LeasedSets, *, overlap: bool | None = None) -> Engine:
    """An engine that takes its blocks from `sets`.

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
    device = sets.pool.bytes.device
    if device.type == "cuda":
        sizes = Sizes(limits.max_running, limits.max_step_tokens, limits.max_model_len)
        warm_up(model.llama, r.layout, sizes, device, deterministic=r.entry.deterministic)
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
    if device.type == "cuda":
        if r.entry.cuda_graphs and not r.entry.deterministic:
            runner.capture(batch_sizes(limits.max_running), cuda_capture())
        compile_monitor().serving = True
    batcher = Batcher(blocks, limits)
    return Engine(
        runner,
        batcher,
        eos_ids=r.config.eos_ids,
        max_model_len=r.max_model_len,
        overlap=overlap,
        seed=r.entry.seed,
    )


def device_pool_bytes(device: str, memory_fraction: float) -> int:
    """What a pool may take on this device now, after the weights: of a GPU what is free within its fraction, less a
    margin for activations; of a host a quarter of what is available."""
    if not device.startswith("cuda"):
        return host_pool_bytes()
    free, total = torch.cuda.mem_get_info(device)
    margin = max(512 << 20, total // 50)
    return max(0, free - int(total * (1 - memory_fraction)) - margin)


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
        size = gpu.pool_bytes or device_pool_bytes(gpu.device, gpu.memory_fraction)
        plan = plan_pool([resolved], gpu, size)
        pool = SlabPool.create(plan, gpu.device)
        sets = LeasedSets(pool, entry.name)
        return cls(resolved, start_engine(model, sets, overlap=overlap), pool, sets, model.report)

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
        self.engine.batcher.blocks.trim()
        self.sets.close()
        self.pool.close()
