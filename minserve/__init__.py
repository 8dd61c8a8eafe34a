"""minserve: several Llama models of different precision on shared GPUs, one KV slab pool.

Importing this package binds the sibling packages `kernels`, `quant` and `sched` that lie beside it.  `sched` is
also a standard-library module and `kernels` a PyPI distribution: without the binding an editable install or a safe
path would hand out the wrong one.  Nothing else happens at import: no torch, no file but the siblings' `__init__`.
"""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from minserve.llm import LLM
    from minserve.sampling import SamplingParams

SIBLINGS = ("kernels", "quant", "sched")


def _bind(name: str, root: Path) -> None:
    """Puts the package `root/name` into sys.modules, in place of a namesake from elsewhere."""
    init = root / name / "__init__.py"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(init):
        return
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])
    if spec is None or spec.loader is None or not init.is_file():
        raise ImportError(f"minserve needs its sibling package {name!r} at {init.parent}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


for _name in SIBLINGS:
    _bind(_name, Path(__file__).resolve().parent.parent)


def __getattr__(name: str) -> Any:
    # lazy, so that a process without tensors (pool workers, the front end) never pays for torch
    if name == "LLM":
        from minserve.llm import LLM

        return LLM
    if name == "SamplingParams":
        from minserve.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'minserve' has no attribute {name!r}")
