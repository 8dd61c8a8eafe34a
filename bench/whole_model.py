"""Steps of whole models with random weights, in every named precision: prefill and decode against their limits.

No checkpoint is read: each distinct matrix is drawn and quantized once and copied for every layer, so that the bytes a
step streams are those of the real model.  The context is written by the model's own prefill.  A decode step is one
CUDA graph (embedding to argmax); what the scheduler around it costs is bench.offline's to say.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.roofline import Precision, decode_limit, kv_token_bytes, prefill_limit
from bench.shapes import Model, Rates
from bench.timing import Ceilings, Stopwatch
from kernels.gemm_w4a8 import prepare_w4a8, prepare_w4a8_progressive, quantize_progressive
from kernels.gemm_w8a8 import prepare_w8a8
from kernels.kv_case import Paged, places
from kernels.kv_layout import SLOT_BITS, KvLayout
from kernels.linear import prepare_linear
from kernels.quant_rows import quant_rows
from minserve.linear import Linear, Prepared
from minserve.model_config import LlamaConfig
from minserve.models import Llama, build_llama
from minserve.rope import rope_tables
from quant.rtn import quantize
from quant.scheme import Scheme

GROUP = 128
SLOTS = 64  # blocks of a slab set
FILL_TOKENS = 8192  # of context written at once
POOL_FLOOR = 64 << 20  # for sets that are only begun


class Cell(NamedTuple):
    weights: str
    kv: str

    @property
    def precision(self) -> Precision:
        return Precision(self.weights.split("-")[0], self.kv)


# the named cells, most informative first; then the rest
CELLS = (
    Cell("w4a8-group", "int4"),
    Cell("w8a8-int8", "int8"),
    Cell("bf16", "bf16"),
    Cell("w8a8-fp8", "fp8"),
    Cell("w4a8-group", "int8"),
    Cell("bf16", "int8"),
    Cell("w8a8-int8", "bf16"),
    Cell("w4a8-fp8", "int4"),
)
MORE_CELLS = (
    Cell("w4a8-channel", "int4"),
    Cell("w4a8-plain", "int4"),
    Cell("w8a8-int8", "int4"),
    Cell("w8a8-fp8", "int4"),
    Cell("bf16", "fp8"),
    Cell("bf16", "int4"),
)


def _w8(w_NK: Tensor, dtype: torch.dtype) -> Prepared:
    rows = quant_rows(w_NK, dtype)
    return prepare_w8a8(rows.codes_TD, rows.scale_T)


def _progressive(w_NK: Tensor) -> Prepared:
    q = quantize_progressive(w_NK, GROUP if w_NK.shape[1] % GROUP == 0 else w_NK.shape[1])
    return prepare_w4a8_progressive(q.codes_NK, q.scale_NQ[:, 0], q.step_NQ, q.zero_NQ)


def _w4(w_NK: Tensor, group: int | None, kind: str) -> Prepared:
    q = quantize(w_NK, Scheme(4, group).fit(w_NK.shape[1]))
    return prepare_w4a8(q.codes_NK, q.scale_NQ, q.zero_NQ, kind=kind)


WEIGHTS: dict[str, Callable[[Tensor], Prepared]] = {
    "bf16": prepare_linear,
    "w8a8-int8": partial(_w8, dtype=torch.int8),
    "w8a8-fp8": partial(_w8, dtype=torch.float8_e4m3fn),
    "w4a8-group": _progressive,
    "w4a8-plain": partial(_w4, group=GROUP, kind="group"),
    "w4a8-channel": partial(_w4, group=None, kind="channel"),
    "w4a8-fp8": partial(_w4, group=GROUP, kind="fp8"),
}


class RandomWeights:
    """Stands where a WeightSource stands; nothing is read."""

    def __init__(self, weights: str, device: torch.device):
        self._prepare, self._device = WEIGHTS[weights], device
        self._made: dict[tuple[int, int], Prepared] = {}

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=self._device, dtype=torch.bfloat16)

    def linear(
        self, names: tuple[str, ...], in_features: int, out_features: tuple[int, ...], bias: bool = False
    ) -> Linear:
        shape = (sum(out_features), in_features)
        if shape not in self._made:
            w_NK = torch.randn(shape, device=self._device, dtype=torch.bfloat16) / in_features**0.5
            self._made[shape] = self._prepare(w_NK)
        return Linear([copy.deepcopy(self._made[shape])], torch.bfloat16)

    def fields(self, module: str, suffixes: tuple[str, ...]) -> dict[str, Tensor]:
        """There is nothing beside a module: no scales of keys and values."""
        return {}

    def head(self, name: str, embed_VD: Tensor, tied: bool) -> Linear:
        return Linear([prepare_linear(embed_VD / embed_VD.shape[1] ** 0.5)], torch.float32)

    def finish(self) -> None:
        self._made.clear()


def hf_config(model: Model, positions: int) -> dict[str, Any]:
    """config.json of a Llama of this shape."""
    s = model.shape
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": s.V,
        "hidden_size": s.D,
        "intermediate_size": s.F,
        "num_hidden_layers": model.layers,
        "num_attention_heads": s.H,
        "num_key_value_heads": s.G,
        "head_dim": s.K,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": model.tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
    }


def random_llama(model: Model, weights: str, positions: int, device: torch.device) -> Llama:
    torch.manual_seed(0)
    config = LlamaConfig.from_dict(hf_config(model, positions))
    source: Any = RandomWeights(weights, device)
    return build_llama(config, source, rope_tables(config, positions, device))


def empty_pool(
    model: Model, layout: KvLayout, batch: int, tokens: int, device: torch.device, slots: int = SLOTS
) -> Paged:
    """Room for `batch` sequences of `tokens`, their blocks scattered over the sets."""
    g = torch.Generator().manual_seed(0)
    blocks = layout.blocks_for(tokens)
    num_sets = -(-batch * blocks // slots)
    slab_bytes = -(-slots * layout.block_bytes // 4096) * 4096
    slabs = torch.randperm(num_sets * model.layers, generator=g)
    place = torch.randperm(num_sets * slots, generator=g)[: batch * blocks]
    table_BN = (place // slots << SLOT_BITS | place % slots).int().view(batch, blocks)
    pool = torch.zeros(num_sets * model.layers * slab_bytes, dtype=torch.uint8, device=device)
    offsets_SL = slabs.view(num_sets, model.layers) * slab_bytes
    return Paged(layout, (tokens,) * batch, pool, offsets_SL.to(device), table_BN)


@dataclass(frozen=True)
class Engine:
    """A random model and a pool, with steps to time on them."""

    llama: Llama
    paged: Paged
    triton: bool | None = None  # None: as the device says

    def step(self, *spans: tuple[int, int, int]) -> Callable[[], Tensor]:
        """The forward pass of (sequence, start, count) spans as a call; returns the token after each span."""
        device = self.paged.pool.device
        step = self.paged.step(places(*spans), self.triton)
        counts = torch.tensor([count for _, _, count in spans])
        last_B = (counts.cumsum(0) - 1).to(device)
        ids_T = torch.randint(2, self.llama.config.vocab_size, (int(counts.sum()),)).to(device)

        def call() -> Tensor:
            x_TD, residual_TD = self.llama.hidden(ids_T, step, self.paged.pool)
            return self.llama.logits(x_TD[last_B], residual_TD[last_B]).argmax(-1)

        return call

    def fill(self, batch: int, context: int) -> None:
        """Writes the first `context` tokens of `batch` sequences."""
        at_once = max(1, FILL_TOKENS // context)
        for first in range(0, batch, at_once):
            self.step(*((b, 0, context) for b in range(first, min(first + at_once, batch))))()


def rates_of(top: Ceilings, low: str) -> Rates:
    return Rates(top.copy, top.bf16, (top.fp8 or top.int8) if "fp8" in low else top.int8)


def step_row(cell: Cell, phase: str, load: tuple[int, int], ms: float, limit_s: float) -> dict[str, Any]:
    batch, context = load
    tokens = context if phase == "prefill" else batch
    return {
        "bench": "whole-model",
        "arm": "minserve",
        "phase": phase,
        "weights": cell.weights,
        "kv": cell.kv,
        "batch": batch,
        "context": context,
        "ms": round(ms, 4),
        "tok_s": round(tokens / ms * 1e3, 1),
        "limit_ms": round(limit_s * 1e3, 4),
        "of_limit": round(limit_s * 1e3 / ms, 4),
        "tag": "measured",
    }


def decode_rows(
    name: str,
    model: Model,
    llama: Llama,
    cell: Cell,
    loads: list[tuple[int, int]],
    watch: Stopwatch,
    top: Ceilings,
) -> Iterator[dict[str, Any]]:
    """One row for each (batch, context)."""
    most, longest = max(b for b, _ in loads), max(c for _, c in loads)
    layout = KvLayout(cell.kv, model.shape.G, model.shape.K)
    engine = Engine(llama, empty_pool(model, layout, most, longest + 1, watch.device))
    engine.fill(most, longest)
    for batch, context in loads:
        call = engine.step(*((b, context - 1, 1) for b in range(batch)))
        timing = watch.time(call, graph=True)
        limit = decode_limit(model, cell.precision, batch, context, rates_of(top, cell.weights))
        row = step_row(cell, "decode", (batch, context), timing.us / 1e3, limit.total_s)
        yield {"model": name, **row, "low_ms": timing.low_us / 1e3, "high_ms": timing.high_us / 1e3}


def prefill_rows(
    name: str, model: Model, llama: Llama, cell: Cell, lengths: list[int], watch: Stopwatch, top: Ceilings
) -> Iterator[dict[str, Any]]:
    """One row for each fresh prompt."""
    layout = KvLayout(cell.kv, model.shape.G, model.shape.K)
    engine = Engine(llama, empty_pool(model, layout, 1, max(lengths), watch.device))
    for length in lengths:
        timing = watch.time(engine.step((0, 0, length)), graph=False)
        limit = prefill_limit(model, cell.precision, length, rates_of(top, cell.weights))
        row = step_row(cell, "prefill", (1, length), timing.us / 1e3, limit.total_s)
        yield {"model": name, **row, "low_ms": timing.low_us / 1e3, "high_ms": timing.high_us / 1e3}


def random_hf(model: Model, positions: int, device: torch.device) -> Any:
    """transformers' model of this shape in bf16, made on the device."""
    import transformers  # seconds to import: only where it is compared with

    transformers.logging.set_verbosity_error()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            config = transformers.LlamaConfig(**hf_config(model, positions))
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def decode_ms(run: Callable[[int], object], new: int) -> tuple[float, float]:
    """Milliseconds to the first token, and of every one after it."""
    clock = Stopwatch(torch.device("cpu"), budget_s=0.0)  # the wall: a run blocks until its tokens are there
    first, whole = (clock.time(partial(run, n)).us / 1e3 for n in (1, new))
    return first, (whole - first) / (new - 1)


def engine_rows(
    name: str, model: Model, loads: list[tuple[int, int]], new: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """The whole engine on a random checkpoint: scheduler, sampling and graphs as they serve."""
    from minserve import LLM  # with all that reads a checkpoint: the other items do without

    batch, prompt = max(b for b, _ in loads), max(p for _, p in loads)
    with tempfile.TemporaryDirectory() as folder:
        random_hf(model, prompt + new + 1, device).save_pretrained(folder)
        for weights, kv in (("none", "auto"), ("w8a8-int8", "int8"), ("w4a8-int8", "int4")):
            cell = Cell("bf16" if weights == "none" else weights, "bf16" if kv == "auto" else kv)
            room = batch * (prompt + new) * kv_token_bytes(model, cell.kv)
            keys = {"quantization": weights, "kv_dtype": kv, "max_model_len": prompt + new + 1}
            keys["enable_prefix_caching"] = False  # each prompt comes twice
            with LLM(
                folder, device=str(device), dtype="bf16", pool_bytes=int(1.5 * room) + POOL_FLOOR, **keys
            ) as llm:
                for load in loads:
                    ids_BT = torch.randint(2, model.shape.V, load).tolist()
                    first, ms = decode_ms(partial(_generate, llm, ids_BT), new)
                    row = step_row(cell, "decode", load, ms, 0.0)
                    yield {"model": name, **row, "arm": "minserve engine", "prefill_ms": round(first, 3)}


def _generate(llm: Any, prompts: list[list[int]], count: int) -> None:
    from minserve import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    made = llm.generate(prompts, params, use_tqdm=False)
    assert all(len(o.outputs[0].token_ids) == count for o in made), "minserve stopped early"


def hf_rows(
    name: str, model: Model, loads: list[tuple[int, int]], new: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """transformers in bf16: `generate`, and its continuous batching, as milliseconds of one decode step."""
    import transformers

    llama = random_hf(model, max(p for _, p in loads) + new + 1, device)

    def generate(ids_BT: Tensor, count: int) -> None:
        llama.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )

    def continuous(ids_BT: Tensor, count: int) -> None:
        keys = transformers.GenerationConfig(
            max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        made = llama.generate_batch(inputs=ids_BT.tolist(), generation_config=keys, progress_bar=False)
        assert all(len(o.generated_tokens) == count for o in made.values()), (
            "continuous batching stopped early"
        )

    # continuous batching changes how the model attends, for good: last
    arms = {"transformers generate": generate}
    if device.type == "cuda":
        arms["transformers continuous"] = continuous
    for arm, run in arms.items():
        for load in loads:
            ids_BT = torch.randint(2, model.shape.V, load, device=device)
            with torch.inference_mode():
                first, ms = decode_ms(partial(run, ids_BT), new)
            row = step_row(Cell("bf16", "bf16"), "decode", load, ms, 0.0)
            yield {"model": name, **row, "arm": arm, "prefill_ms": round(first, 3)}
