"""Many clients at once over plain sockets: streams that are read to the end, and clients that leave at any moment.

`python -m tests.e2e.load URL COUNT [MODEL ...]` runs it against any server and prints what happened.
"""

import asyncio
import collections
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from minserve.listener import raise_open_files
from tests.e2e.running import events

LEAVERS = 0.2
PHASES = ("while sending", "after sending", "at the first bytes", "in mid stream")


@dataclass
class Outcome:
    """One client's story.  `left`: it went away on purpose."""

    body: dict[str, Any]
    left: str | None = None
    error: str | None = None
    events: list[Any] = field(default_factory=list)
    first_s: float = 0.0
    total_s: float = 0.0

    def text(self) -> str:
        return "".join(c["text"] for e in self.events if e for c in e["choices"])

    def check(self) -> str | None:
        """What is wrong with a stream that was read to its end."""
        if self.error is not None:
            return self.error
        if not self.events or self.events[-1] is not None:
            return f"no [DONE]: {self.events[-1:]}"
        ends = [c["finish_reason"] for e in self.events if e for c in e["choices"] if c["finish_reason"]]
        if len(ends) != 1:
            return f"{len(ends)} finish reasons"
        usage = self.events[-2]["usage"]
        limit = self.body["max_tokens"]
        if ends[0] == "length" and usage["completion_tokens"] != limit:
            return f"{usage} for max_tokens={limit}"
        return None


def request_bytes(host: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def dechunk(data: bytes) -> bytes:
    """ValueError where the last chunk is missing: the server cut the connection."""
    out, at = [], 0
    while True:
        end = data.index(b"\r\n", at)
        size = int(data[at:end], 16)
        if size == 0:
            return b"".join(out)
        out.append(data[end + 2 : end + 2 + size])
        at = end + 4 + size


async def one(
    address: tuple[str, int], body: dict[str, Any], phase: str | None, rng: random.Random
) -> Outcome:
    outcome, began = Outcome(body, phase), time.monotonic()
    reader, writer = await asyncio.open_connection(*address)
    try:
        data = request_bytes(address[0], body)
        writer.write(data[: len(data) // 2] if phase == "while sending" else data)
        await writer.drain()
        if phase in ("while sending", "after sending"):
            await asyncio.sleep(rng.random() * 0.3)
            return outcome
        head = await reader.readuntil(b"\r\n\r\n")
        outcome.first_s = time.monotonic() - began
        if not head.startswith(b"HTTP/1.1 200"):
            outcome.error = head.split(b"\r\n")[0].decode() + (await reader.read()).decode()[:200]
            return outcome
        if phase is not None:
            await reader.read(1 if phase == "at the first bytes" else rng.randrange(100, 3000))
            return outcome
        outcome.events = events(dechunk(await reader.read()).decode())
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    finally:
        outcome.total_s = time.monotonic() - began
        writer.close()
    return outcome


async def load(url: str, models: list[str], count: int, seed: int = 0, max_tokens: int = 48) -> list[Outcome]:
    """All clients at once; a fifth of them leave."""
    host, port = url.removeprefix("http://").split(":")
    rng = random.Random(seed)
    jobs = []
    for i in range(count):
        body = {
            "model": models[i % len(models)],
            "prompt": f"Tell me of number {i}",
            "seed": i,
            "stream": True,
        }
        body |= {"max_tokens": rng.randrange(1, max_tokens), "stream_options": {"include_usage": True}}
        phase = rng.choice(PHASES) if rng.random() < LEAVERS else None
        jobs.append(one((host, int(port)), body, phase, random.Random(i)))
    return await asyncio.gather(*jobs)


def main() -> None:
    url, count, *models = sys.argv[1:]
    raise_open_files()
    began = time.monotonic()
    found = asyncio.run(load(url, models, int(count)))
    stayed = [o for o in found if o.left is None]
    wrong = collections.Counter(w for o in stayed if (w := o.check()))
    first = sorted(o.first_s for o in stayed)
    print(
        f"{len(found)} clients, {len(found) - len(stayed)} left, {sum(wrong.values())} errors: {dict(wrong)}"
    )
    print(
        f"{time.monotonic() - began:.1f} s; first token p50 {first[len(first) // 2]:.2f} s, p99 {first[-len(first) // 100]:.2f} s"
    )


if __name__ == "__main__":
    main()
