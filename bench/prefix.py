"""What the prefix cache saves and what it costs: time to the first token behind a shared beginning, and host time.

    python -m bench.prefix                       # the demo model, 512 shared tokens, 32 of each request's own
    python -m bench.prefix --model DIR --shared 2048

TTFT is that of one request alone, in process; two engines of the same weights, the cache on and off, take turns, and
every answer must be the same.  Host time, this thread's own whatever else runs: a block by its ways through the pool,
hashing, and `plan` with 64 that run and arrivals to replace them, without keys, with keys that are never found, with
512 of 544 tokens found, and with a pool so small that each block taken is one evicted.  Medians; ends with JSON.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.offline import machine
from minserve import LLM, SamplingParams
from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.limits import Limits
from sched.prefix import keys_of, root_key
from sched.step import Request

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo"
P, SLOTS, RUNNING, PROMPT, SHARED, OUTPUT = 32, 16, 64, 544, 512, 64
ROOT = root_key("bench")


class Sets:
    """A source without a table: what the blocks alone cost."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))

    def lease(self, *, urgent: bool = False) -> int | None:
        return self._free.pop() if self._free else None

    def give_back(self, set_id: int) -> None:
        self._free.append(set_id)


def ttft(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds from a prompt to its first token, with the cache and without."""
    keys = {"device": args.device, "dtype": args.dtype, "pool_bytes": 256 << 20}
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    rng = random.Random(0)
    times: dict[bool, list[float]] = {True: [], False: []}
    with LLM(args.model, **keys) as on, LLM(args.model, enable_prefix_caching=False, **keys) as off:
        vocab = on._local.resolved.config.vocab_size
        shared = [rng.randrange(2, vocab) for _ in range(args.shared)]
        for turn in range(args.repeats + 1):
            prompt = shared + [rng.randrange(2, vocab) for _ in range(args.own)]
            answers = []
            for cached, llm in ((True, on), (False, off)):
                begin = time.perf_counter()
                out = llm.generate([prompt], params, use_tqdm=False)[0]
                if turn:  # the first fills the cache, and warms up both
                    times[cached].append(time.perf_counter() - begin)
                answers.append(out)
            one, other = (out.outputs[0].token_ids for out in answers)
            # bf16 may round another way behind another cut of the prompt
            assert args.dtype != "fp32" or one == other, f"{one} with the cache, {other} without"
    with_s, without_s = statistics.median(times[True]), statistics.median(times[False])
    return {
        "prompt": args.shared + args.own,
        "cached": answers[0].num_cached_tokens,
        "with_ms": round(with_s * 1e3, 2),
        "without_ms": round(without_s * 1e3, 2),
        "x": round(without_s / with_s, 2),
        "least_with_ms": round(min(times[True]) * 1e3, 2),
        "least_without_ms": round(min(times[False]) * 1e3, 2),
    }


def timed(run: Callable[[], int], repeats: int) -> float:
    """Median ns of this thread's time for one of as many as `run` says it did."""
    found = []
    for _ in range(repeats):
        begin = time.thread_time_ns()
        count = run()
        found.append((time.thread_time_ns() - begin) / count)
    return round(statistics.median(found), 1)


def paths(repeats: int) -> dict[str, float]:
    """ns a block, one by one as decodes take them (`hit`: 16 as a prompt does); ns a token hashed."""
    pool, n = BlockPool(Sets(1000), SLOTS, P), 4000
    keys = keys_of(ROOT, range(n * P), P)
    held: list[int] = []
    prompt = tuple(random.Random(1).randrange(1 << 17) for _ in range(4096))

    def allocate() -> int:
        for _ in range(n):
            held.extend(pool.allocate(1) or ())
        return n

    def free() -> int:
        for block in held:
            pool.release((block,))
        held.clear()
        return n

    def both() -> int:
        return allocate() and free()

    def fill() -> int:
        allocate()
        pool.publish(held, keys)
        return free()

    def hit() -> int:
        for at in range(0, n, 16):
            found = pool.match(keys[at : at + 16])
            pool.share(found)
            pool.release(found)
        return n

    out = {"allocate and free": timed(both, repeats)}
    out["hash, a token"] = timed(lambda: len(keys_of(ROOT, prompt, P)) * P, repeats)
    fill()
    out["hit: find, share, release"] = timed(hit, repeats)
    pool.give_up(1000)
    small = BlockPool(Sets(n // SLOTS), SLOTS, P)

    def evict() -> int:
        """Every block is taken from the cache, and put there again under another key."""
        for i in range(n):
            block = small.allocate(1) or []
            small.publish(block, (b"%d %d" % (evict_round[0], i),))
            small.release(block)
        evict_round[0] += 1
        return n

    evict_round = [0]
    evict()
    out["evict, allocate, publish, release"] = timed(evict, repeats)
    assert small.num_evicted >= n * repeats
    return out


def planning(kind: str, steps: int) -> dict[str, float]:
    """us of `plan` and of `add` while RUNNING requests decode and each that ends is replaced."""
    needed = RUNNING * -(-(PROMPT + OUTPUT) // P)
    sets = needed // SLOTS + 8 if kind == "evicting" else 100_000 // SLOTS
    limits = Limits(
        max_running=RUNNING, max_step_tokens=2048, max_chunk_tokens=2048, max_model_len=4096, max_waiting=9999
    )
    batcher = Batcher(BlockPool(Sets(sets), SLOTS, P), limits)
    rng = random.Random(0)
    shared = tuple(rng.randrange(1 << 17) for _ in range(SHARED))
    plans, adds = [], []
    for step in range(steps):
        while batcher.num_running + batcher.num_waiting < RUNNING + 4:
            own = tuple(rng.randrange(1 << 17) for _ in range(PROMPT - SHARED if kind == "found" else PROMPT))
            prompt = shared + own if kind == "found" else own
            begin = time.thread_time()
            keys = () if kind == "no keys" else keys_of(ROOT, prompt, P)
            # lengths differ, so that the requests do not end all at once
            output = OUTPUT // 2 + batcher._num_added % OUTPUT
            batcher.add(Request(rid=batcher._num_added, prompt_tokens=PROMPT, max_tokens=output, keys=keys))
            adds.append(time.thread_time() - begin)
        begin = time.thread_time()
        plan = batcher.plan(0.0)
        if step > steps // 4:
            plans.append(time.thread_time() - begin)
        batcher.advance(plan, 1, 0.0)
    plans.sort()
    return {
        "plan_us": round(statistics.median(plans) * 1e6, 1),
        "plan_mean_us": round(statistics.mean(plans) * 1e6, 1),
        "plan_p99_us": round(plans[len(plans) * 99 // 100] * 1e6, 1),
        "add_us": round(statistics.median(adds) * 1e6, 1),
        "evicted": batcher.blocks.num_evicted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO, help="a Llama folder; default: the demo's")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--shared", type=int, default=512)
    parser.add_argument("--own", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    first = ttft(args)
    blocks = paths(args.repeats)
    plans = {kind: planning(kind, args.steps) for kind in ("no keys", "not found", "found", "evicting")}
    print(f"TTFT, {first['prompt']} tokens, {first['cached']} of them cached: {first['with_ms']} ms", end="")
    print(f", without the cache {first['without_ms']} ms, {first['x']}x", end="")
    print(f" (least {first['least_with_ms']} and {first['least_without_ms']} ms)")
    for what, ns in blocks.items():
        print(f"  {what:<36}{ns:>8.1f} ns")
    print(f"  {'plan, ' + str(RUNNING) + ' running':<24}{'median':>10}{'mean':>10}{'p99':>10}{'add':>10} us")
    for kind, row in plans.items():
        print(
            f"  {kind:<24}{row['plan_us']:>10}{row['plan_mean_us']:>10}{row['plan_p99_us']:>10}{row['add_us']:>10}"
        )
    print(
        json.dumps({"bench": "prefix", "ttft": first, "ns": blocks, "plans": plans, **machine(args.device)})
    )


if __name__ == "__main__":
    main()
