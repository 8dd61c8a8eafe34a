"""How calls are timed here: medians with their spread, caches flushed, graphs for what is shorter than its launch.

On a GPU events stand right around the call, behind a write that pushes everything out of L2 and gives the host time to
enqueue.  On a CPU it is the wall clock.  `ceilings` are what a plain copy and plain matmuls reach on the same device in
the same run: percentages are of those, not of a datasheet.
"""

import statistics
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

GRAPH_BELOW_US = 20.0
FLUSH_BYTES = 256 << 20  # five times the largest L2 there is
REPEATS = (10, 50)
CLOCK_FIELDS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "driver_version")


class Timing(NamedTuple):
    """Microseconds: median, and the middle nine tenths of the repeats."""

    us: float
    low_us: float
    high_us: float
    repeats: int
    launch: str


class Ceilings(NamedTuple):
    """Bytes and operations a second that plain library calls reach."""

    copy: float
    bf16: float
    int8: float
    fp8: float | None


def summary(times_us: list[float], launch: str) -> Timing:
    times = sorted(times_us)
    cut = len(times) // 20
    return Timing(
        round(statistics.median(times), 2),
        round(times[cut], 2),
        round(times[len(times) - 1 - cut], 2),
        len(times),
        launch,
    )


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph, warmed up on a stream of its own first, as capture demands."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class Stopwatch:
    """Times calls on one device."""

    def __init__(self, device: torch.device, budget_s: float = 0.4):
        self.device, self.budget_s = device, budget_s
        flush_bytes = FLUSH_BYTES if device.type == "cuda" else 0
        self._flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def time(self, call: Callable[[], object], *, graph: bool | None = None) -> Timing:
        """`graph` None: where the call is short."""
        if self.device.type != "cuda":
            return self._on_cpu(call)
        for _ in range(3):
            call()
        first_us = statistics.median(self._events(call, 5))
        launch = "eager"
        if graph or (graph is None and first_us < GRAPH_BELOW_US):
            try:
                call, launch = captured(call), "graph"
            except RuntimeError:
                if graph:
                    raise
                torch.cuda.synchronize(self.device)  # a fault that is no matter of capturing shows here
        repeats = min(max(int(self.budget_s * 1e6 / (first_us + 100)), REPEATS[0]), REPEATS[1])
        return summary(self._events(call, repeats), launch)

    def _events(self, call: Callable[[], object], repeats: int) -> list[float]:
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        for begin, end in pairs:
            self._flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) * 1e3 for begin, end in pairs]

    def _on_cpu(self, call: Callable[[], object]) -> Timing:
        times_us: list[float] = []
        call()
        stop = time.perf_counter() + self.budget_s
        while len(times_us) < 3 or (time.perf_counter() < stop and len(times_us) < REPEATS[1]):
            begin = time.perf_counter()
            call()
            times_us.append((time.perf_counter() - begin) * 1e6)
        return summary(times_us, "cpu")


def has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def scaled_mm(
    x_TK: Tensor,
    w_NK: Tensor,
    scale_T: Tensor,
    scale_N: Tensor,
    dtype: torch.dtype,
    fast: bool = True,
) -> Tensor:
    """torch's own fp8 product with one scale a row and one a column; `fast` sums stay in the tensor core."""
    return torch._scaled_mm(
        x_TK, w_NK.t(), scale_a=scale_T[:, None], scale_b=scale_N[None], out_dtype=dtype, use_fast_accum=fast
    )


def ceilings(watch: Stopwatch, side: int | None = None) -> Ceilings:
    """Measured anew: a copy of 1 GiB and square matmuls of `side`, 8192 on a GPU."""
    device = watch.device
    gpu = device.type == "cuda"
    n = side or (8192 if gpu else 512)
    source = torch.empty(1 << (30 if gpu else 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    flops = 2 * n**3
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    codes = torch.randint(-127, 128, (n, n), device=device, dtype=torch.int8)

    def rate(amount: int, call: Callable[[], object]) -> float:
        return amount / watch.time(call, graph=False).us * 1e6

    fp8 = None
    if has_fp8(device):
        ones, narrow = torch.ones(n, device=device), a.to(torch.float8_e4m3fn)
        fp8 = rate(flops, lambda: scaled_mm(narrow, narrow, ones, ones, torch.bfloat16))
    return Ceilings(
        copy=rate(2 * source.numel(), lambda: target.copy_(source)),
        bf16=rate(flops, lambda: a @ a),
        int8=rate(flops, lambda: torch._int_mm(codes, codes.t())),
        fp8=fp8,
    )


def said_by(command: list[str]) -> str:
    """What a command prints; nothing where it is not there or fails, as a figure less must not end a run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def clocks(device: torch.device) -> dict[str, str]:
    """What nvidia-smi says of the GPU's clocks; empty without one, or where it says nothing."""
    if device.type != "cuda":
        return {}
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(CLOCK_FIELDS)}",
        "--format=csv,noheader",
        f"--id={device.index or 0}",
    ]
    values = said_by(command).split(", ")
    return dict(zip(CLOCK_FIELDS, values, strict=True)) if len(values) == len(CLOCK_FIELDS) else {}
