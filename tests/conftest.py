"""What every test relies on: no network, one thread, Triton's interpreter where there is no GPU, and poison.

A second thread on matrices this small spins more than it works, and takes a core away from who runs beside.

The interpreter has to be chosen before any module with a kernel is imported, which is why this happens here at import.
Poison: memory that a kernels module asks for with torch.empty* arrives full of NaN (integers: the smallest value), so
an element that is never written fails the test instead of showing yesterday's answer.
"""

import os
import random
import sys
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

import pytest
import torch

import minserve  # noqa: F401  binds kernels, quant and sched to this checkout

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    assert "triton" not in sys.modules, "triton was imported before TRITON_INTERPRET could be set"
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.interpreter import repair

    repair()

torch.set_num_threads(1)

POISONED = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects `gpu` tests on a machine without one: deselected is counted, and is not a skip to get used to."""
    if HAS_CUDA:
        return
    away = [item for item in items if item.get_closest_marker("gpu")]
    if away:
        config.hook.pytest_deselected(items=away)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.is_floating_point:
        return tensor.fill_(float("nan"))
    return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).min)


def poisoned(allocate):
    """`allocate`, poisoning its result when a module of the package `kernels` called it."""

    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return poison(tensor) if caller.startswith("kernels.") else tensor

    return wrapper


@pytest.fixture(autouse=True)
def _same_draws():
    """A test draws the same whichever ran before it."""
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For what must hold however a product is divided among threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _poison_fresh_memory():
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in POISONED:
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield
