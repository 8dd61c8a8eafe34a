"""A GPU for machines without one: with `-p tests.pretend_gpu` the suite believes it is on one.

What would fail there for being on the wrong device fails here too: operations on tensors of two devices, kernels that
are given a host's tensor, numpy on a GPU's.  A GPU's tensors are a subclass that says so, in a host's memory; kernels
are interpreted, with a driver's answers made up.  Numbers, speed, streams and captured graphs stay a real GPU's to show.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map_only
from triton.runtime import interpreter

from minserve import graphs, loading
from tests.interpreter import repair
from tests.minserve import rerun

repair()
GPU, HOST = torch.device("cuda", 0), torch.device("cpu")


class OnGpu(torch.Tensor):
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    return x.as_subclass(OnGpu)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    return (t for t in tree_iter(value) if isinstance(t, torch.Tensor))


def to(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    copy = kwargs.pop("copy", False)
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    device = x.device if device is None else device
    if device.type == x.device.type and dtype in (None, x.dtype) and not copy:
        return x
    y = x.as_subclass(torch.Tensor).to(dtype or x.dtype, copy=True)
    return on_gpu(y) if device.type == "cuda" else y.to(device)


def numpy(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(x, OnGpu):
        raise TypeError(f"can't convert {x.device} device type tensor to numpy")
    return torch.Tensor.numpy(x, *args, **kwargs)


METHODS: dict[str, Callable[..., Any]] = {
    "to": to,
    "cpu": lambda x, **kwargs: to(x, HOST),
    "cuda": lambda x, *args, **kwargs: to(x, GPU),
    "pin_memory": lambda x: x,
    "numpy": numpy,
}
# copies, and questions that read no element
MIXES = {"copy_", "__setitem__", "__getitem__", "__get__", "__set__", "type_as", "result_type", "__repr__"}


class Belief(TorchFunctionMode):
    """Between torch's interface and its kernels: keeps every tensor on the device where it would be."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name in METHODS and args and isinstance(args[0], torch.Tensor):
                return METHODS[name](*args, **kwargs)
            given = list(tensors((args, kwargs)))
            here = any(isinstance(t, OnGpu) for t in given)
            kwargs.pop("pin_memory", None)
            if kwargs.get("device") is not None:
                here = torch.device(kwargs["device"]).type == "cuda"
                kwargs["device"] = HOST if here else kwargs["device"]
            elif here and (name not in MIXES or (name == "__getitem__" and not isinstance(args[0], OnGpu))):
                away = [tuple(t.shape) for t in given if t.dim() and not isinstance(t, OnGpu)]
                if away:
                    raise RuntimeError(f"{name}: all tensors must be on the same device, not so {away}")
            out = func(*args, **kwargs)
            if not here:
                return out
            known = {id(t) for t in given}
            return tree_map_only(torch.Tensor, lambda t: t if id(t) in known else on_gpu(t), out)


def argument(a: Any) -> Any:
    """What a kernel is given, as the host's memory that it is."""
    if isinstance(a, interpreter.TensorDescriptor):
        return interpreter.TensorDescriptor(argument(a.base), a.shape, a.strides, a.block_shape, a.padding)
    if not isinstance(a, torch.Tensor):
        return a
    if not isinstance(a, OnGpu):
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    return a.as_subclass(torch.Tensor)


class Event:
    def __init__(self, **kwargs: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def record(self) -> None:
        pass

    synchronize = record


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


PROPERTIES = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=2, shared_memory_per_block_optin=232448
)
DRIVER: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_capability": lambda device=None: (9, 0),
    "mem_get_info": lambda device=None: (140 << 30, 141 << 30),
    "synchronize": lambda device=None: None,
    "Event": Event,
    "Stream": Stream,
    "current_stream": lambda device=None: Stream(),
    "stream": lambda stream: nullcontext(),
    "device": lambda device: nullcontext(),
    "memory_reserved": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "max_memory_reserved": lambda device=None: 0,
}


def pytest_configure(config: pytest.Config) -> None:
    start = interpreter.GridExecutor.__call__

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        with torch._C.DisableTorchFunction():
            start(self, *map(argument, args), **{name: argument(a) for name, a in kwargs.items()})

    interpreter.GridExecutor.__call__ = run
    # every variant that serving could need, interpreted, would take hours
    loading.warm_up = lambda *args, **kwargs: None
    loading.cuda_capture = graphs.cuda_capture = lambda: rerun.capture


for name, answer in DRIVER.items():
    setattr(torch.cuda, name, answer)
# for good: everything from here on happens on a machine with a GPU
Belief().__enter__()
