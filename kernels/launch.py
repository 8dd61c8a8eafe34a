"""What the CPU can do, and the way to a GPU; nothing else in this package asks a machine anything.

`launch` starts a compiled kernel without Triton's own path to it, which binds and specializes every argument anew
(docs/log.md has the times).  What a kernel's code depends on is its key: see `KernelStarter`.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver as DRIVER
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

INT32 = 1 << 31
HOOKS = knobs.runtime
# how a CompiledKernel is started is no public interface: other versions take Triton's own path
STARTS_DIRECTLY = triton.__version__.startswith("3.6.")


class CpuFacts(NamedTuple):
    bf16: bool  # multiplies bf16 in hardware
    vnni: bool  # multiplies int8 into int32 without saturating in between


@functools.cache
def cpu_facts() -> CpuFacts:
    def has(feature: str) -> bool:
        ask = getattr(torch.cpu, f"_is_{feature}_supported", None)
        return bool(ask and ask())

    amx = has("amx_tile")
    return CpuFacts(bf16=amx or has("avx512_bf16"), vnni=amx or has("vnni") or has("avx512_vnni"))


class GpuFacts(NamedTuple):
    """What a launch shape depends on.  `num_sms`: those this process may use, fewer than the chip has under MPS."""

    name: str
    capability: int  # 90 for sm_90
    num_sms: int
    shared_bytes: int  # one program may have


# what kernels are shaped for where no GPU is: in the interpreter, and ahead of time
ASSUMED = {
    80: GpuFacts("NVIDIA A100", 80, 108, 166912),
    89: GpuFacts("NVIDIA L40S", 89, 142, 101376),
    90: GpuFacts("NVIDIA H200", 90, 132, 232448),
    100: GpuFacts("NVIDIA B200", 100, 148, 232448),
}


# by GPU: what this process may use of it where CUDA does not say so, in a green context; set before the first launch
SM_LIMITS: dict[int, int] = {}


@functools.cache
def _facts(index: int) -> GpuFacts:
    p = torch.cuda.get_device_properties(index)
    capability = 10 * p.major + p.minor
    sms = min(p.multi_processor_count, SM_LIMITS.get(index, p.multi_processor_count))
    return GpuFacts(p.name, capability, sms, p.shared_memory_per_block_optin)


def gpu_facts(device: torch.device) -> GpuFacts:
    """Of the GPU a tensor is on; on a CPU, of the one that is compiled for ahead of time, else of an H200."""
    if device.type == "cuda":
        return _facts(torch.cuda.current_device() if device.index is None else device.index)
    return ASSUMED[getattr(DRIVER._active, "capability", 90)]


def default_device() -> torch.device:
    """The GPU, or the CPU where none is."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Started(NamedTuple):
    """A loaded kernel.  `tail` stands in for the constants, which its code already holds."""

    run: Any
    function: Any
    packed_metadata: Any
    tail: tuple[None, ...]


class KernelStarter:
    """Starts one kernel, compiled or not.  Its cache changes no result: a key names all that the code depends on.

    The key of a launch: the device, every option and constant, the type of every tensor and which of them do not start
    on 16 bytes, `int` for an integer that is `do_not_specialize` and fits 32 bits, any other integer itself (Triton
    compiles 1 and multiples of 16 apart).
    """

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self._started: dict[tuple[Any, ...], _Started] = {}
        self._free = tuple(p.do_not_specialize for p in kernel.params)

    def __call__(self, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        driver = DRIVER.active
        device = driver.get_current_device()
        if type(args[0]) is Tensor:
            of = args[0].get_device()  # -1: on the host, when nothing is launched
            assert of in (device, -1), (
                f"{self.kernel.__name__}: tensors of device {of}, the current one is {device}"
            )
        key, raw, address_bits = [device, *meta, *meta.values()], [], 0
        for a, free in zip(args, self._free):  # noqa: B905  the parameters of the constants are left over
            kind = type(a)
            if kind is Tensor:
                # the address in place of the tensor: the launcher would ask CUDA about each
                address = a.data_ptr()
                address_bits |= address
                raw.append(address)
                key.append(a.dtype)
                continue
            raw.append(a)
            if kind is int:
                key.append(a if not free else int if -INT32 <= a < INT32 else (int, 64))
            elif kind is float or kind is bool or a is None:
                key.append(kind)
            else:
                assert kind is TensorDescriptor, f"{self.kernel.__name__} was given a {kind}"
                key.append((a.base.dtype, tuple(a.block_shape), a.padding))
        if address_bits % 16:
            key.append(tuple(i for i, a in enumerate(args) if type(a) is Tensor and a.data_ptr() % 16))
        known = self._started.get(tuple(key))
        if known is None or HOOKS.launch_enter_hook.calls or HOOKS.launch_exit_hook.calls:
            self._by_triton(tuple(key), grid, args, meta)
            return
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        stream = driver.get_current_stream(device)
        run, function, packed, tail = known
        run(x, y, z, stream, function, packed, None, None, None, *raw, *tail)

    def _by_triton(
        self, key: tuple[Any, ...], grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]
    ) -> None:
        """Triton's own path: compiles what is not compiled, and starts it."""
        name, params = self.kernel.__name__, self.kernel.params
        wrong = [p.name for i, p in enumerate(params) if p.is_constexpr == (i < len(args))]
        assert not wrong, f"{name}: arguments come first, constants behind them and by name; not so {wrong}"
        compiled = self.kernel[grid](*args, **meta)
        # a driver that only names a target has nothing to start; a hook may refuse to compile
        if compiled is not None and STARTS_DIRECTLY and hasattr(DRIVER.active, "launcher_cls"):
            tail = (None,) * (len(params) - len(args))
            self._started[key] = _Started(compiled.run, compiled.function, compiled.packed_metadata, tail)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """kernel[grid](*args, **meta).

    While serving nothing may be compiled: tensors start on 16 bytes, integers that vary are `do_not_specialize`.
    """
    if not isinstance(kernel, JITFunction):  # interpreted
        kernel[grid](*args, **meta)
        return
    starter = getattr(kernel, "starter", None)
    if starter is None:
        starter = kernel.starter = KernelStarter(kernel)
    starter(grid, args, meta)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, in the order of its stream; the tensor itself where that is the host.

    Through pinned memory: a copy from pageable memory would wait for the step that still runs.
    """
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def aligned(x: Tensor) -> Tensor:
    """`x`, or a copy of it that starts on 16 bytes, which a slice may not."""
    return x.clone() if x.data_ptr() % 16 else x


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
