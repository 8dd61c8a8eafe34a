"""`python -m bench.launches`: host time of one kernel launch, without the driver's own part of it.

Needs no GPU: a driver that launches nothing stands in.  Triton's own path against `kernels.launch.launch`.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from kernels.launch import launch

REPEATS, CALLS = 200, 300


@triton.jit(do_not_specialize=["n", "m"])
def _small_kernel(out, x, n, m, A: tl.constexpr, B: tl.constexpr):
    tl.store(out + tl.arange(0, B), tl.load(x + tl.arange(0, B)) + n + m * A)


@triton.jit(do_not_specialize=["n", "m", "k"])
def _large_kernel(  # noqa: PLR0913
    a, b, c, d, e, f, g, h, i, n, m, k, eps,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    F: tl.constexpr, G: tl.constexpr, H: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    tl.store(a + tl.arange(0, B), tl.load(b + tl.arange(0, B)) + n + m * eps)


class NoDriver:
    """Compiles for an sm_90 and launches nothing."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448}

        @staticmethod
        def load_binary(*args: Any) -> tuple[int, ...]:
            return 1, 1, 64, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def microseconds(call: Callable[[], Any]) -> float:
    """The shortest mean of REPEATS rounds: other work on the machine only ever adds."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - start)
    return best / CALLS * 1e6


def main() -> None:
    driver.set_active(NoDriver())
    x = [torch.zeros(64) for _ in range(9)]
    cases = {
        "2 tensors, 2 scalars, 2 constants": (_small_kernel, (*x[:2], 5, 7), {"A": 3, "B": 64}),
        "9 tensors, 4 scalars, 9 constants": (
            _large_kernel,
            (*x, 5, 7, 9, 1e-5),
            {**dict.fromkeys("ACDEFGH", 3), "B": 64, "DTYPE": tl.float16, "num_warps": 4, "num_stages": 2},
        ),
    }
    results = []
    for name, (kernel, args, meta) in cases.items():
        own = microseconds(lambda: kernel[(1,)](*args, **meta))  # noqa: B023  called at once
        ours = microseconds(lambda: launch(kernel, (1,), *args, **meta))  # noqa: B023
        print(f"{name}: Triton's own path {own:.1f} us, launch {ours:.1f} us")
        results.append({"case": name, "triton_us": round(own, 2), "launch_us": round(ours, 2)})
    print(json.dumps({"bench": "launches", "tag": "measured", "host_only": True, "results": results}))


if __name__ == "__main__":
    sys.exit(main())
