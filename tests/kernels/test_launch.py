"""Launching a compiled kernel directly: what starts is what Triton itself would have started.

A driver that launches nothing records each start.  The kernels here are compiled, not interpreted, wherever they run:
they use nothing of Triton's library that the interpreter replaces.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels.launch import launch


def _scale(out, x, n, pitch, factor, SIZE: tl.constexpr, DOUBLE: tl.constexpr = False):
    o_n = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    y = tl.load(x + o_n * pitch, mask=o_n < n, other=0.0) * factor
    tl.store(out + o_n, y * 2 if DOUBLE else y, mask=o_n < n)


class Recorder:
    """A CUDA driver whose launcher keeps the arguments it is called with."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132}

        @staticmethod
        def load_binary(name: str, code: bytes, shared: int, device: int) -> tuple[int, ...]:
            return 1, hash(code), 64, 0, 1024

    def __init__(self) -> None:
        self.starts: list[tuple[Any, ...]] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: self.starts.append(args)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 77


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    recorder = Recorder()
    # of this run: what an earlier one compiled would hide that this one cannot
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    monkeypatch.setattr(driver, "_active", recorder)
    yield recorder
    knobs.runtime.jit_post_compile_hook = None


@pytest.fixture
def compiles(recorder: Recorder) -> list[str]:
    """Grows by one line a compile."""
    lines: list[str] = []
    knobs.runtime.jit_post_compile_hook = lambda *, repr, **rest: lines.append(repr)
    return lines


@pytest.fixture
def kernel() -> JITFunction:
    return JITFunction(_scale, do_not_specialize=["n"])


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(64, dtype=dtype), torch.zeros(64, dtype=dtype)


def plain(start: tuple[Any, ...]) -> tuple[Any, ...]:
    """A start without what only profilers read and without constants; addresses in place of tensors."""
    x, y, z, stream, function, packed, _, _, _, *args = start
    args = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
    return (x, y, z, stream, function, packed, *args[:5])


@pytest.mark.parametrize("grid", [(3,), (3, 2), (3, 2, 4)])
def test_a_direct_start_is_tritons_own(
    kernel: JITFunction, recorder: Recorder, grid: tuple[int, ...]
) -> None:
    def own(*args: Any, **meta: Any) -> None:
        kernel[grid](*args, **meta)

    def ours(*args: Any, **meta: Any) -> None:
        launch(kernel, grid, *args, **meta)

    out, x = tensors()
    for run in (own, ours, ours):
        run(out, x, 61, 1, 0.5, SIZE=64, num_warps=2)
        run(x, out, 17, 1, 2.0, SIZE=64, num_warps=2)
    starts = [plain(s) for s in recorder.starts]
    assert starts[0:2] == starts[2:4] == starts[4:6]
    # the last two bypassed Triton: only it hands over hooks
    assert [s[6:9] == (None, None, None) for s in recorder.starts] == [False, False, False, True, True, True]
    assert len(starts[0]) == 11
    assert starts[0][4] == starts[1][4]


def test_code_is_never_used_for_what_it_was_not_compiled_for(
    kernel: JITFunction, compiles: list[str]
) -> None:
    out, x = tensors()

    def run(*args: Any, new: int, **meta: Any) -> None:
        before = len(compiles)
        for _ in range(2):
            launch(kernel, (1,), *args, **({"SIZE": 64} | meta))
        assert len(compiles) - before == new, f"{args[2:]} {meta} compiled {compiles[before:]}"

    run(out, x, 5, 3, 1.0, new=1)
    run(out, x, 6, 3, 1.0, new=0)
    run(out, x, 16, 3, 2.5, new=0)
    run(out, x, 1, 3, 1.0, new=0)
    run(out, x, 1 << 31, 3, 1.0, new=1)
    run(out, x, 5, 1, 1.0, new=1)
    run(out, x, 5, 32, 1.0, new=1)
    run(out, x, 5, 48, 1.0, new=0)
    run(out, x, 5, 5, 1.0, new=0)
    run(out, x, 5, 3, 1, new=1)
    run(out, x[1:], 5, 3, 1.0, new=1)
    run(out[1:], x, 5, 3, 1.0, new=1)
    run(out[4:], x[4:], 5, 3, 1.0, new=0)
    run(*tensors(torch.float16), 5, 3, 1.0, new=1)
    run(out, x, 5, 3, 1.0, SIZE=32, new=1)
    run(out, x, 5, 3, 1.0, DOUBLE=True, new=1)
    run(out, x, 5, 3, 1.0, num_warps=8, new=1)
    run(out, x, 5, 3, 1.0, new=0)


def test_profilers_see_every_start(kernel: JITFunction, recorder: Recorder) -> None:
    out, x = tensors()
    seen: list[Any] = []
    launch(kernel, (1,), out, x, 5, 1, 1.0, SIZE=64)
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        for _ in range(3):
            launch(kernel, (1,), out, x, 5, 1, 1.0, SIZE=64)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    launch(kernel, (1,), out, x, 5, 1, 1.0, SIZE=64)
    hooks = [start[7] for start in recorder.starts]
    assert hooks == [knobs.runtime.launch_enter_hook] * 4 + [None]


def test_constants_among_the_arguments_are_refused(kernel: JITFunction, recorder: Recorder) -> None:
    out, x = tensors()
    with pytest.raises(AssertionError, match=r"_scale: .* not so \['SIZE'\]"):
        launch(kernel, (1,), out, x, 5, 1, 1.0, 64)
    with pytest.raises(AssertionError, match=r"not so \['factor'\]"):
        launch(kernel, (1,), out, x, 5, 1, factor=1.0, SIZE=64)


def test_a_driver_that_only_names_a_target_starts_nothing(
    kernel: JITFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: calls.append(args))
    monkeypatch.setattr(driver, "_active", type("Named", (), {"get_current_device": lambda self: 90})())
    out, x = tensors()
    for _ in range(3):
        launch(kernel, (1,), out, x, 5, 1, 1.0, SIZE=64)
    assert len(calls) == 3


def test_tensors_of_another_device_than_the_current_one_are_refused(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = JITFunction(_scale, do_not_specialize=["n", "pitch"])
    args = (torch.empty(64), torch.empty(64), 64, 1, 2.0)
    launch(kernel, (1,), *args, SIZE=64)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 1)
    with pytest.raises(AssertionError, match="tensors of device 1, the current one is 0"):
        launch(kernel, (1,), *args, SIZE=64)
    monkeypatch.setattr(recorder, "get_current_device", lambda: 1)
    launch(kernel, (1,), *args, SIZE=64)
