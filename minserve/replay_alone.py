"""What a request takes that has the server to itself: TTFT0 and TPOT0, which SLOs are multiples of.

For each model some prompt lengths of the workload, one request at a time, each a few times with prompts that nobody had.
TTFT0 is a line in the prompt's tokens through the fastest of each length; TPOT0 the median of all.
"""

import asyncio
from typing import Any, Protocol

import numpy as np

from minserve.replay_heard import Heard
from sched.workload import Request, Workload, token_ids

QUANTILES, REPEATS, ANSWER = (5, 35, 65, 95), 4, 24
PATIENCE_S = 120.0


class Clock(Protocol):
    def start(self, in_s: float) -> None: ...
    def __call__(self) -> float: ...


async def measure_alone(
    workload: Workload, target: Any, clock: Clock, ids: tuple[int, int]
) -> dict[str, Any]:
    """By model ttft_s, ttft_per_token_s and tpot_s, as `Slo` has them.  ValueError where a request fails."""
    session = max(r.session for r in workload.requests)
    found = {}
    for model in workload.models:
        known = [r.prompt_tokens for r in workload.requests if r.model == model]
        lengths = sorted({int(n) for n in np.percentile(known, QUANTILES)})
        times, tokens = [], []
        for length in lengths:
            tries = []
            for _ in range(REPEATS):
                session += 1
                heard = await one(
                    Request(0, model, 0.0, length, ANSWER, session), workload.seed, target, clock, ids
                )
                record = heard.record()
                if not record.completed or heard.sent_s is None:
                    raise ValueError(
                        f"a request alone must end well, got {heard.error or 'no end'} of {model}"
                    )
                tries.append(record.ttft_s - heard.sent_s)
                tokens.append(record.tpot_s)
            times.append(min(tries))
        found[model] = line(lengths, times) | {"tpot_s": round(float(np.median(tokens)), 9)}
    return found


def line(lengths: list[int], times: list[float]) -> dict[str, float]:
    """Through (tokens, seconds) by least squares, neither part below 0."""
    x, y = np.array(lengths, float), np.array(times)
    slope = float(np.polyfit(x, y, 1)[0]) if len(x) > 1 else 0.0
    start = float(y.mean() - slope * x.mean())
    if slope < 0:
        slope, start = 0.0, float(y.mean())
    elif start < 0:
        slope, start = float((x * y).sum() / (x * x).sum()), 0.0
    return {"ttft_s": round(start, 9), "ttft_per_token_s": round(slope, 12)}


async def one(request: Request, seed: int, target: Any, clock: Clock, ids: tuple[int, int]) -> Heard:
    heard = Heard(request)
    data = target.prepared(request, token_ids(request, seed, *ids).tolist())
    clock.start(0.0)
    target.send(data, heard)
    while not heard.over and clock() < PATIENCE_S:
        await asyncio.sleep(0.002)
    return heard
