"""What a kernel declares about itself: the contract between an op file, the tests and the bench.

A spec holds named runs of one op (`cpu`, `triton`), its reference and its cases; tests and bench read nothing else, so
they cannot disagree on shapes.  `make` builds canonical arguments (plain tensors and values) that the reference takes
as they are; a run whose op wants them prepared (packed weights, a pool) names a `prepare` that converts them once.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from kernels.launch import GpuFacts


class Bound(NamedTuple):
    """What a result may err by, where that follows from a rounding inside the op and not from what torch itself loses."""

    truth: torch.Tensor
    each: torch.Tensor  # of every element
    rms: float


class ModelShape(NamedTuple):
    """The dimensions of a Llama: width, query and KV heads, head dim, feed-forward width, vocabulary."""

    D: int
    H: int
    G: int
    K: int
    F: int
    V: int


class Cost(NamedTuple):
    """What the op cannot avoid: the bytes it moves and the operations it computes."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Case:
    """One shape: the activation dtype and whatever dimensions and options the op's `make` reads by name."""

    dtype: torch.dtype
    dims: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.dims[name]

    @property
    def id(self) -> str:
        """Reads as a shape: T5-D129-float16."""
        words = [
            name if value is True else f"{name}{value}"
            for name, value in self.dims.items()
            if value is not False
        ]
        return "-".join([*words, str(self.dtype).removeprefix("torch.")])


def case(dtype: torch.dtype, **dims: Any) -> Case:
    return Case(dtype, dims)


@dataclass(frozen=True)
class KernelSpec:
    """`row_args`: positions of the arguments with one row a token; a row of the result depends on that row alone.

    `compiles`: cases, small in what is no constant of the kernel, that launch each of its variants once.
    `invariant`: the keywords a run needs for that to hold bit for bit, where it does not always.
    `serving`: the cases that serving a model of this shape launches.  `config`: what the launcher picks for a case;
    `candidates`: what a tuner may try in its place; a Triton run takes either as `config=`.  `small`: a case with the
    same compile-time constants as this one, small in everything else.
    `bound`: the error that a Triton run may make in a case, given its canonical arguments; None: that of torch.
    `timed`: of runs that do more than launch (build steps, read back what was written), the launch alone.
    `streams`: for a kernel's name, the bytes that one turn of its hot loop reads from memory, given its constexprs.
    """

    name: str
    runs: Mapping[str, Callable[..., Any]]
    ref: Callable[..., Any]
    make: Callable[[Case, torch.Generator], tuple[Any, ...]]
    cost: Callable[[Case], Cost]
    tests: tuple[Case, ...]
    benches: tuple[Case, ...]
    compiles: tuple[Case, ...] = ()
    prepare: Mapping[str, Callable[..., tuple[Any, ...]]] = field(default_factory=dict)
    row_args: tuple[int, ...] = (0,)
    invariant: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    serving: Callable[[ModelShape], tuple[Case, ...]] = lambda shape: ()
    config: Callable[[Case, GpuFacts], Any] | None = None
    candidates: Callable[[Case, GpuFacts], Iterable[Any]] = lambda case, gpu: ()
    small: Callable[[Case], Case] = lambda case: case
    bound: Callable[[Case, tuple[Any, ...]], Bound | None] = lambda case, args: None
    timed: Mapping[str, Callable[..., Callable[[], Any]]] = field(default_factory=dict)
    streams: Mapping[str, Callable[[Mapping[str, Any]], int]] = field(default_factory=dict)

    def bind(self, run: str, args: tuple[Any, ...], **options: Any) -> Callable[[], Any]:
        """The run as a call without arguments: what is done once (packing) is done here, outside any timing."""
        prepared = self.prepare[run](*args) if run in self.prepare else args
        return lambda: self.runs[run](*prepared, **options)

    def launch(self, run: str, args: tuple[Any, ...], **options: Any) -> Callable[[], Any]:
        """What is to be timed of a run, as `bind` has it."""
        if run in self.timed:
            return self.timed[run](*args, **options)
        return self.bind(run, args, **options)
