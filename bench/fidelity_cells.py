"""What the fidelity gate runs: two models in two precisions, cells of mix, load, SLO and bursts, and their workloads.

Coefficients come from cells of their own: other mixes, loads and seeds than those that are judged.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minserve.config import Config, parse_config
from sched.latency import StepCost
from sched.synthetic import Laws, Lengths, Model, synthetic
from sched.workload import Workload, ordered

PLAIN, CODED = "plain", "w8"
BOTH = (PLAIN, CODED)


@dataclass(frozen=True, slots=True)
class Scale:
    """What is run on a kind of device: a Llama's shape (LlamaConfig's keys), keys of the two models, token lengths."""

    shape: Mapping[str, int]
    dtype: str
    pool: str
    prompt: float
    answer: float
    window: int
    running: int
    step_tokens: int


# 57 million parameters; a GPU has a model that fills it
SCALES = {
    "cpu": Scale(
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
         "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 1024},
        "fp32", "1 GiB", prompt=48, answer=16, window=512, running=16, step_tokens=256,
    ),
    "cuda": Scale(
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 8192},
        "bf16", "16 GiB", prompt=768, answer=128, window=8192, running=64, step_tokens=2048,
    ),
    "quick": Scale(
        {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 1024},
        "fp32", "64 MiB", prompt=48, answer=16, window=512, running=16, step_tokens=256,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """`loads`: by model, its rate over what it reaches with nothing beside it (a lone model) or beside the other at its
    most (two).  `slo`: TTFT and TPOT over what a request takes alone.  `cv`: of the gaps between arrivals."""

    name: str
    loads: Mapping[str, float]
    slo: float = 5.0
    cv: float = 1.0

    @property
    def together(self) -> bool:
        return len(self.loads) > 1


def both(plain: float, coded: float) -> dict[str, float]:
    return {PLAIN: plain, CODED: coded}


FIT = (
    Cell("fit plain", {PLAIN: 0.6}, cv=2),
    Cell("fit plain full", {PLAIN: 1.1}, cv=2),
    Cell("fit w8", {CODED: 0.6}, cv=2),
    Cell("fit w8 full", {CODED: 1.1}, cv=2),
    Cell("fit both", both(0.65, 0.65), cv=2),
    Cell("fit both full", both(1.1, 1.1), cv=2),
)
JUDGED = (
    Cell("plain, light", {PLAIN: 0.4}),
    Cell("plain, busy", {PLAIN: 0.8}),
    Cell("plain, saturated", {PLAIN: 1.5}, slo=10),
    Cell("w8, light", {CODED: 0.4}),
    Cell("w8, busy", {CODED: 0.8}),
    Cell("w8, saturated", {CODED: 1.5}, slo=10),
    Cell("both, light", both(0.4, 0.4)),
    Cell("both, busy", both(0.8, 0.8)),
    Cell("both, busy, loose", both(0.75, 0.75), slo=10),
    Cell("both, bursts", both(0.6, 0.6), slo=10, cv=4),
    Cell("both, saturated", both(1.5, 1.5), slo=10),
    Cell("mostly plain", both(0.9, 0.3)),
    Cell("mostly w8", both(0.3, 0.9)),
    Cell("plain saturated beside w8", both(1.5, 0.4), slo=10),
)
QUICK = tuple(c for c in JUDGED if c.name in ("plain, busy", "w8, saturated", "both, busy"))


def write_model(folder: Path, shape: Mapping[str, int]) -> int:
    """A random checkpoint; returns its parameters."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, bos_token_id=0, eos_token_id=1)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def config_of(scale: Scale, model: Path, device: str, profile: Path | None) -> Config:
    """Two models of one checkpoint that share a pool.  Prompts are computed, not found: a repeat must do what the first did."""
    common = {
        "path": str(model), "dtype": scale.dtype, "max_model_len": scale.window, "max_num_seqs": scale.running,
        "max_num_batched_tokens": scale.step_tokens, "enable_prefix_caching": False,
        "reserve_tokens": scale.window, "profile": None if profile is None else str(profile),
    }  # fmt: skip
    models = [
        {"name": PLAIN, **common},
        {"name": CODED, **common, "quantization": "w8a8-int8", "kv_dtype": "int8"},
    ]
    nodes = [{"name": "local", "gpus": [{"name": "pool", "device": device, "pool_bytes": scale.pool}]}]
    return parse_config({"nodes": nodes, "models": models}, Path.cwd())


def workload_of(
    cell: Cell,
    scale: Scale,
    seconds: float,
    rates: Mapping[str, float],
    costs: Mapping[str, StepCost],
    seed: int,
) -> Workload:
    """`rates`: requests a second by model.  Each request has its own SLO, by `costs` of it alone."""
    lengths = Lengths(scale.prompt, scale.answer, max_len=scale.window // 2)
    models = [Model(name, rates[name], lengths) for name in cell.loads]
    made = synthetic(models, Laws(cv=cell.cv), seconds=seconds, seed=seed)
    own = []
    for r in made.requests:
        first, token = alone(costs[r.model], r.prompt_tokens, r.output_tokens, scale.step_tokens)
        own.append(
            dataclasses.replace(
                r, ttft_slo_s=round(cell.slo * first, 6), tpot_slo_s=round(cell.slo * token, 6)
            )
        )
    return dataclasses.replace(made, requests=ordered(own))


def alone(cost: StepCost, prompt: int, answer: int, step_tokens: int) -> tuple[float, float]:
    """TTFT and TPOT of a request with nothing beside it, in seconds."""
    first = 0.0
    for start in range(0, prompt, step_tokens):
        count = min(step_tokens, prompt - start)
        first += cost.decode_s(0, 0) + cost.chunk_s(start, count) + cost.rows_s(count) - cost.rows_s(0)
    return first, cost.decode_s(1, prompt + answer // 2)


def plain(value: Any) -> Any:
    """Rounded for a file that people read."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
