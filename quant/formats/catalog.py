"""Which format a checkpoint's quantized layers have: its tensors decide, then its config; and the one way to read them.

A format is a module of this folder with `NAME`, `SUFFIXES` (every tensor it may put beside a linear layer, the bias
apart), `detect(infos, raw)` over all tensors of the checkpoint, `read_config(raw)`, `load(module, fields, N, K, config)`
and `targets(module, config)`.  A new one is a file and a line in FORMATS; they are asked in that order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from quant.formats import awq, compressed_tensors, fireq, fp8, gptq, qserve
from quant.scheme import QuantWeight

PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Info(Protocol):
    """What the header of a file says of one tensor."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Format(Protocol):
    NAME: str
    SUFFIXES: tuple[str, ...]

    def detect(self, infos: Mapping[str, Info], raw: Mapping[str, Any] | None) -> bool: ...
    def read_config(self, raw: Mapping[str, Any] | None) -> Any: ...
    def load(
        self, module: str, fields: Mapping[str, Tensor], out_features: int, in_features: int, config: Any
    ) -> QuantWeight: ...
    def targets(self, module: str, config: Any) -> bool: ...


# the most particular tensors first; compressed-tensors takes what no other does
FORMATS: tuple[Format, ...] = (fireq, qserve, gptq, awq, fp8, compressed_tensors)


@dataclass(frozen=True, slots=True)
class Reader:
    """One checkpoint's format, bound to its config."""

    format: Format
    config: Any

    def fields(self, module: str, infos: Mapping[str, Info]) -> list[str]:
        """Suffixes of the tensors that a quantized `module` has; empty where it is plain (or not there at all)."""
        found = [s for s in self.format.SUFFIXES if f"{module}.{s}" in infos]
        plain = found in ([], ["weight"]) and all(infos[f"{module}.{s}"].dtype in PLAIN for s in found)
        return [] if plain else found

    def settled(self, infos: Mapping[str, Info], tensor: Callable[[str], Tensor]) -> "Reader":
        """With what only the tensors of the whole checkpoint can tell: the order of QServe's scales.  ValueError where
        they do not."""
        if self.format is not qserve:
            return self
        return replace(self, config=qserve.settled(self.config, infos, tensor))

    def targets(self, module: str) -> bool:
        """Whether the config says that `module` is quantized; without one nothing does."""
        return self.format.targets(module, self.config)

    def load(
        self, module: str, fields: Mapping[str, Tensor], out_features: int, in_features: int
    ) -> QuantWeight:
        """ValueError naming the module where the tensors and the config do not make one weight of that shape."""
        try:
            return self.format.load(module, fields, out_features, in_features, self.config)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error

    def bias_factor(self, fields: Mapping[str, Tensor]) -> float:
        """What the bias beside these tensors is to be multiplied with: FireQ stores it at the scale of its codes."""
        return fireq.bias_factor(fields) if self.format is fireq else 1.0


def recognise(infos: Mapping[str, Info], raw: Mapping[str, Any] | None) -> Reader:
    """The reader of a checkpoint with these tensors and this quantization_config (or compression_config).

    ValueError where the config is one that no format here has, or that the detected format refuses.
    """
    found = next((f for f in FORMATS if f.detect(infos, raw)), None)
    method = raw.get("quant_method") if raw is not None else None
    if found is None and method is not None:
        known = ", ".join(f.NAME for f in FORMATS)
        raise ValueError(f"quantization_config: quant_method must be one of {known}, got {method!r:.80}")
    found = found or FORMATS[-1]
    return Reader(found, found.read_config(raw))
