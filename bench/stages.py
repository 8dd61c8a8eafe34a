"""The stages of a GPU run as lists of items, the most informative first.

An item is a name and a function that yields rows.  In a dry run the same functions build the same arguments at small
sizes on a CPU, check the CPU run where there is one and compile the kernels instead of launching them.
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import sharing, sm_shares, whole_model
from bench.kernels import machine, measure, rehearse
from bench.shapes import MODELS, TINY
from bench.target import recorded
from bench.timing import Ceilings, Stopwatch, ceilings
from bench.whole_model import CELLS, MORE_CELLS, Cell
from kernels import backend
from kernels.catalog import SPECS
from kernels.launch import ASSUMED
from kernels.spec import Case, KernelSpec, case

ROOT = Path(__file__).resolve().parent.parent
TARGET = 90
ELEMENT_WISE = (
    "rmsnorm",
    "silu_mul",
    "quant_rows",
    "rope_kv_write",
    "kv_dequant",
    "kv_to_fp8",
    "copy_blocks",
    "sample",
    "linear",
)
MATMUL = ("gemm_w4a8", "gemm_w8a8", "w4_to_w8")
# sequences and their context, or their prompt
LOADS = [(1, 1024), (16, 1024), (64, 1024)]


@dataclass
class Workshop:
    """What items share: the device, a stopwatch, the ceilings, and what every row says of the machine."""

    dry: bool
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = torch.device("cpu" if self.dry else "cuda:0")

    @cached_property
    def watch(self) -> Stopwatch:
        return Stopwatch(self.device, budget_s=0.0 if self.dry else 0.4)

    @cached_property
    def top(self) -> Ceilings:
        return ceilings(self.watch, side=64 if self.dry else None)

    @cached_property
    def where(self) -> dict[str, Any]:
        return machine(self.device)


Rows = Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Item:
    """`rehearsal`: items that have the same one do the same in a dry run, so one of them is enough."""

    stage: str
    name: str
    run: Callable[[Workshop, float], Rows]
    rehearsal: str


def items_of(stage: str, *, dry: bool) -> list[Item]:
    items = STAGES[stage]()
    return list({item.rehearsal: item for item in reversed(items)}.values())[::-1] if dry else items


def ceiling_rows(shop: Workshop, deadline: float) -> Rows:
    yield {"bench": "ceilings", **shop.top._asdict(), "tag": "measured"}


# correctness


def pytest_rows(shop: Workshop, deadline: float, path: str) -> Rows:
    """One file of tests on the device, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-rf", path]
    command += ["--collect-only"] if shop.dry else ["-m", "not slow"]
    budget_s = max(30.0, deadline - time.time())
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=budget_s, check=False
        )
    except subprocess.TimeoutExpired:
        return
    # 5: every test of the file was deselected
    found = re.findall(r"(\d+) (passed|failed|errors?)", done.stdout)
    counts = {word: int(n) for n, word in found}
    row = {
        "bench": "correctness",
        "file": path,
        "passed": counts.get("passed", 0),
        "failed": sum(v for k, v in counts.items() if k != "passed"),
        "red": re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)[:50],
        "tag": "measured",
    }
    if done.returncode not in (0, 5):
        row["error"] = (done.stdout + done.stderr)[-1500:]
    yield row


def test_files() -> list[str]:
    away = {"test_aot.py", "test_interpreter.py"}  # these are about machines without a GPU
    own = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    kernels = [f"tests/kernels/{p.name}" for p in own if p.name not in away]
    first = [p for p in kernels if p.endswith("test_specs.py")]
    others = [
        "tests/minserve/test_llm.py",
        "tests/minserve/test_warmup.py",
        "tests/minserve/test_keeper.py",
        "tests/minserve/test_gpu_sharing.py",
        "tests/e2e/test_triton_engine.py",
    ]
    found = [p for p in others if (ROOT / p).exists()]
    return first + [p for p in kernels if p not in first] + found


def correctness() -> list[Item]:
    return [Item("correctness", path, partial(pytest_rows, path=path), "pytest") for path in test_files()]


# single ops


def spec_of(name: str) -> KernelSpec | None:
    return next((s for s in SPECS if s.name == name), None)


def kernel_rows(shop: Workshop, deadline: float, spec: KernelSpec, case: Case) -> Rows:
    if shop.dry:
        yield rehearse(spec, case, TARGET)
    else:
        yield measure(spec, case, shop.watch, shop.top)


def kernel_items(stage: str, pairs: Iterable[tuple[KernelSpec, Case]]) -> list[Item]:
    items = {}
    for spec, c in pairs:
        name, config = f"{spec.name} {c.id}", spec.config(c, ASSUMED[TARGET]) if spec.config else None
        rehearsal = f"{spec.name} {spec.small(c).id} {config}"
        items[name] = Item(stage, name, partial(kernel_rows, spec=spec, case=c), rehearsal)
    return [Item(stage, "ceilings", ceiling_rows, "ceilings"), *items.values()]


def attention() -> list[Item]:
    """Decodes of the targets first, then prefill, then the other shapes and the rest of serving."""
    spec = spec_of("attention")
    assert spec is not None
    wide, narrow = ({"H": m.shape.H, "G": m.shape.G, "K": m.shape.K} for m in reversed(MODELS.values()))
    formats = ("bf16", "int8", "int4", "fp8", "int4z")
    cases = [case(torch.bfloat16, **wide, fmt=f, decodes=64, context=4096) for f in formats]
    cases += [case(torch.bfloat16, **wide, fmt=f, chunk=8192) for f in ("bf16", "fp8")]
    cases += [
        case(torch.bfloat16, **wide, fmt=f, decodes=b, context=n)
        for b, n in ((16, 1024), (1, 8192), (64, 1024))
        for f in formats[:4]
    ]
    cases += [case(torch.bfloat16, **wide, fmt=f, chunk=2048) for f in ("bf16", "fp8", "int8", "int4")]
    cases += [case(torch.bfloat16, **narrow, fmt=f, decodes=64, context=4096) for f in formats[:4]]
    served = [c for m in MODELS.values() for c in spec.serving(m.shape)]
    return kernel_items("attention", [(spec, c) for c in (*cases, *served)])


def served(ops: tuple[str, ...], order: Callable[[Case], Any]) -> list[tuple[KernelSpec, Case]]:
    """Cases of serving, the larger model first."""
    pairs = []
    for model in reversed(MODELS.values()):
        found = [(s, c) for s in map(spec_of, ops) if s for c in (*s.serving(model.shape), *s.benches)]
        pairs += sorted(found, key=lambda pair: order(pair[1]))
    return pairs


def matmul() -> list[Item]:
    first = {16: 0, 64: 1, 1: 2, 2048: 3}
    return kernel_items("matmul", served(MATMUL, lambda c: first.get(c.dims.get("T", 0), 9)))


def element_wise() -> list[Item]:
    return kernel_items("element-wise", served(ELEMENT_WISE, lambda c: -c.dims.get("T", 0)))


# whole models


@contextmanager
def compiling(shop: Workshop) -> Iterator[None]:
    """In a dry run: the engine takes its Triton path, and what it launches is compiled."""
    if not shop.dry:
        yield
        return
    with recorded(TARGET), mock.patch.object(backend, "runs_triton", return_value=True):
        yield


def cell_rows(shop: Workshop, deadline: float, name: str, cell: Cell) -> Rows:
    if not shop.dry and "fp8" in "".join(cell) and torch.cuda.get_device_capability() < (8, 9):
        yield {
            "bench": "whole-model",
            "model": name,
            **cell._asdict(),
            "unsupported": "no fp8",
            "tag": "measured",
        }
        return
    model = TINY if shop.dry else MODELS[name]
    loads = [(1, 32), (3, 32)] if shop.dry else LOADS
    lengths = [48] if shop.dry else [2048, 8192]
    with compiling(shop):
        longest = max(*lengths, *(context + 1 for _, context in loads))
        llama = whole_model.random_llama(model, cell.weights, longest, shop.device)
        yield from whole_model.decode_rows(name, model, llama, cell, loads, shop.watch, shop.top)
        yield from whole_model.prefill_rows(name, model, llama, cell, lengths, shop.watch, shop.top)


def hf_rows(shop: Workshop, deadline: float, name: str) -> Rows:
    model, loads, new = (TINY, [(1, 4)], 3) if shop.dry else (MODELS[name], LOADS, 33)
    yield from whole_model.hf_rows(name, model, loads, new, shop.device)


def engine_rows(shop: Workshop, deadline: float, name: str) -> Rows:
    model, loads, new = (TINY, [(2, 4)], 3) if shop.dry else (MODELS[name], LOADS, 33)
    yield from whole_model.engine_rows(name, model, loads, new, shop.device)


def whole() -> list[Item]:
    def cells(name: str, chosen: tuple[Cell, ...]) -> list[Item]:
        return [
            Item(
                "whole-model", f"{name} {c.weights} kv {c.kv}", partial(cell_rows, name=name, cell=c), str(c)
            )
            for c in chosen
        ]

    def transformers(name: str) -> Item:
        return Item("whole-model", f"{name} transformers", partial(hf_rows, name=name), "transformers")

    small, large = MODELS
    first = [*cells(large, CELLS[:3]), transformers(large), *cells(large, CELLS[3:])]
    return [
        Item("whole-model", "ceilings", ceiling_rows, "ceilings"),
        *first,
        *cells(small, CELLS),
        transformers(small),
        Item("whole-model", f"{small} engine", partial(engine_rows, name=small), "engine"),
        *cells(large, MORE_CELLS),
        *cells(small, MORE_CELLS),
    ]


# several processes on one GPU


def sharing_rows(shop: Workshop, deadline: float, processes: int, cell: Cell) -> Rows:
    yield from sharing.rows(processes, cell, dry=shop.dry)


def shared() -> list[Item]:
    items = []
    for c in CELLS[:2]:
        for n in (1, 2, 4):
            name = f"{n} processes {c.weights} kv {c.kv}"
            items.append(Item("sharing", name, partial(sharing_rows, processes=n, cell=c), "sharing"))
    return items


def shares() -> list[Item]:
    """Acceptance of the modes of sharing: what the machine allows, what a mode costs alone, who slows whom."""

    def matrix(mode: str) -> Callable[[Workshop, float], Rows]:
        return lambda shop, deadline: sm_shares.matrix_rows(mode, dry=shop.dry)

    probe = Item("sm-shares", "probe", lambda shop, _: sm_shares.probe_rows(dry=shop.dry), "probe")
    cost = Item("sm-shares", "one model", lambda shop, _: sm_shares.cost_rows(dry=shop.dry), "one model")
    modes = [
        Item("sm-shares", f"matrix {m}", matrix(m), "none" if m == "none" else "mode")
        for m in sm_shares.MODES
    ]
    return [probe, cost, *modes]


STAGES: dict[str, Callable[[], list[Item]]] = {
    "correctness": correctness,
    "attention": attention,
    "matmul": matmul,
    "element-wise": element_wise,
    "whole-model": whole,
    "sharing": shared,
    "sm-shares": shares,
}
