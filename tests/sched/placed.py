"""Small placement problems: models of three sizes and precisions on GPUs of one or two kinds."""

import random
from typing import Any

from sched.placement import Gpu, Model, Problem
from sched.step_time import DEVICES, Work, roofline

GB = 1e9
# parameters, layers, KV heads
SHAPES = {"3b": (3.2e9, 28, 8), "8b": (8.0e9, 32, 8), "14b": (14.8e9, 48, 8)}
BITS = {"fp16": (16, 16), "w8": (8, 8), "w4": (4, 4)}


def model(name: str = "m", shape: str = "8b", bits: str = "fp16", rate: float = 2.0, **given: Any) -> Model:
    """SLOs of 10 times what a request takes alone; tp 1 and 2 unless `degrees` says otherwise."""
    parameters, layers, heads = SHAPES[shape]
    weights, kv_bits = BITS[bits]
    kv = 2 * layers * heads * 128 * kv_bits / 8
    costs, degrees = {}, given.pop("degrees", (1, 2))
    for kind in ("a100", "h100"):
        costs[kind] = {
            (tp, 100): roofline(
                Work(
                    weight_bytes=parameters * weights / 8 / tp,
                    parameters=parameters / tp,
                    kv_token_bytes=kv / tp,
                    bits=16 if weights == 16 else 8,
                ),
                DEVICES[kind],
            )
            for tp in degrees
        }
    alone = costs["h100"][min(costs["h100"])]
    step = alone.decode_s(1, 0)
    own: dict[str, Any] = {
        "name": name, "weight_bytes": parameters * weights / 8, "kv_token_bytes": kv, "costs": costs, "rate": rate,
        "prompt_tokens": 800.0, "output_tokens": 150.0, "ttft_s": 10 * step, "tpot_s": 10 * step,
        "ttft_per_token_s": 10 * alone.per_prefill_token_s, "kv_heads": heads, "layers": layers, "work_bytes": GB,
    }  # fmt: skip
    return Model(**own | given)


def problem(
    models: int | list[Model], gpus: int = 2, memory_gb: float = 60.0, seed: int = 0, **given: Any
) -> Problem:
    """So many models drawn by the seed, or those given."""
    if isinstance(models, int):
        rng = random.Random(seed)
        models = [
            model(
                f"m{i}", rng.choice(list(SHAPES)), rng.choice(list(BITS)), rng.uniform(0.5, 6.0), degrees=(1,)
            )
            for i in range(models)
        ]
    per_node = given.pop("per_node", 8)
    places = [Gpu(f"g{i}", memory_gb * GB, "h100", f"n{i // per_node}") for i in range(gpus)]
    return Problem(tuple(models), tuple(places), **given)
