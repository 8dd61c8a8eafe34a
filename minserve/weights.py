"""WeightSource: hands a model its weights by name, once each, and holds the file to account.

Strict: a tensor of the wrong shape, a missing one, and one that nobody took are errors that name it.  Layers are
loaded as the file has them (plain or quantized), or plain ones are quantized here (`w8a8-int8`, `w4a8-int8`, round to
nearest); embeddings and norms stay as they are, the head too unless it is asked for in 8 bits.  One tensor at a time is in memory besides the result.
"""

import difflib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kernels.gemm_w4a8 import W4Weight, prepare_w4a8
from kernels.gemm_w8a8 import FP8, W8Weight, prepare_w8a8
from kernels.launch import gpu_facts
from kernels.linear import prepare_linear
from kernels.quant_rows import quant_rows
from minserve.checkpoint import Checkpoint, listed
from minserve.linear import Linear, Prepared
from quant.formats.catalog import PLAIN, recognise
from quant.rtn import quantize
from quant.scheme import ONLINE, QuantWeight, fuse

# buffers that old exporters saved beside the weights; they follow from the config
DERIVED = (".rotary_emb.inv_freq",)
AS_STORED = ("auto", "none")
# what the head may be quantized to, one scale a token and one an entry of the vocabulary
HEAD_DTYPES = {"int8": torch.int8, "fp8": FP8}
# rows of it that are quantized at once: their float32 copy is small beside the head
ROWS_AT_ONCE = 4096


@dataclass(slots=True)
class ReportRow:
    """The linear layers of one scheme: how many, through which kernel, in how many bytes."""

    scheme: str
    kernel: str
    layers: int = 0
    weights: int = 0
    nbytes: int = 0
    note: str = ""

    def __str__(self) -> str:
        bits = 8 * self.nbytes / max(1, self.weights)
        text = f"{self.scheme}: {self.layers} layers, kernel {self.kernel}, {bits:.2f} bits per weight"
        return f"{text}, {self.nbytes / 1e6:.1f} MB" + (f" ({self.note})" if self.note else "")


@dataclass(slots=True)
class LoadReport:
    """What was loaded and how it will be computed, for start-up to print and tests to read."""

    rows: dict[tuple[str, str], ReportRow] = field(default_factory=dict)
    other_bytes: int = 0
    derived: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.other_bytes + sum(row.nbytes for row in self.rows.values())

    def lines(self) -> list[str]:
        return [str(row) for row in self.rows.values()] + [
            f"embeddings and norms: {self.other_bytes / 1e6:.1f} MB"
        ]


class WeightSource:
    """Reads `folder`; everything it returns is in `dtype` on `device` and owns its memory.

    `quantization` is auto (as stored), none (as stored, and that must be plain), or a scheme for plain layers.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        quantization: str = "auto",
        quantization_config: dict[str, Any] | None = None,
        lm_head: str = "auto",
        progress: bool | None = None,
    ) -> None:
        if quantization not in AS_STORED and quantization not in ONLINE:
            choices = ", ".join((*AS_STORED, *ONLINE))
            raise ValueError(f"quantization must be one of {choices}, got {quantization!r}")
        if lm_head != "auto" and lm_head not in HEAD_DTYPES:
            raise ValueError(f"lm_head must be one of {', '.join(('auto', *HEAD_DTYPES))}, got {lm_head!r}")
        self.dtype, self.device = dtype, torch.device(device)
        if lm_head == "fp8" and self.device.type == "cuda" and gpu_facts(self.device).capability < 89:
            raise ValueError(
                "lm_head must be auto or int8 on a GPU before sm_89, which has no fp8, got 'fp8'"
            )
        self.quantization, self.lm_head = quantization, lm_head
        self.report = LoadReport()
        self._checkpoint = Checkpoint(folder)
        self._reader = recognise(self._checkpoint.infos, quantization_config)
        self._left = dict.fromkeys(self._checkpoint)
        show = sys.stderr.isatty() if progress is None else progress
        self._bar = tqdm(
            total=self._checkpoint.nbytes, unit="B", unit_scale=True, desc="weights", disable=not show
        )

    def __enter__(self) -> "WeightSource":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One plain tensor: an embedding, a norm."""
        value = self._plain(name, shape)
        self.report.other_bytes += value.nbytes
        return value

    def linear(
        self, names: tuple[str, ...], in_features: int, out_features: tuple[int, ...], bias: bool = False
    ) -> Linear:
        """The modules `names` stacked along their outputs; run one by one where their schemes differ."""
        assert len(names) == len(out_features), f"{names} and {out_features} differ in length"
        shards = [self._shard(n, in_features, N) for n, N in zip(names, out_features, strict=True)]
        biases = [
            self._plain(f"{n}.bias", (N,)) if bias else None for n, N in zip(names, out_features, strict=True)
        ]
        weights = [self._prepare(w, b) for w, b in _joined(shards, biases)]
        return Linear(weights, self.dtype)

    def head(self, name: str, embed_VD: Tensor, tied: bool) -> Linear:
        """The output projection; where tied, the embedding itself, and a stored copy must equal it."""
        V, D = embed_VD.shape
        stored = f"{name}.weight"
        weight: Tensor | QuantWeight = embed_VD
        if not tied:
            weight = self._shard(name, D, V, online=False)
        elif stored in self._checkpoint and not torch.equal(self._plain(stored, (V, D)), embed_VD):
            raise ValueError(f"{stored} differs from the embedding, but the config says tie_word_embeddings")
        if isinstance(weight, QuantWeight):
            raise ValueError(f"{name} is quantized ({weight.scheme}); supported: a plain head")
        head: Prepared
        if self.lm_head in HEAD_DTYPES:
            head = self._head_in_8_bits(name, weight)
        elif tied:
            head = prepare_linear(weight)
            # a CPU packs weights for its matmul: then the head is a second copy of the embedding
            self.report.other_bytes += head.nbytes if head.form != "dense" else 0
        else:
            head = self._prepare(weight, None)
        return Linear([head], torch.float32)

    def _head_in_8_bits(self, name: str, weight_VD: Tensor) -> W8Weight:
        parts = [quant_rows(rows, HEAD_DTYPES[self.lm_head]) for rows in weight_VD.split(ROWS_AT_ONCE)]
        scale_V = torch.cat([part.scale_T for part in parts])
        if not bool(torch.isfinite(scale_V).all()):
            raise ValueError(f"{name} must be finite to be quantized")
        head = prepare_w8a8(torch.cat([part.codes_TD for part in parts]), scale_V)
        self._book(f"{name} {self.lm_head} (channel, symmetric)", "gemm_w8a8", head)
        return head

    def finish(self) -> LoadReport:
        """Ends the loading; raises ValueError naming every tensor that nobody took."""
        derived = [name for name in self._left if name.endswith(DERIVED)]
        left = [name for name in self._left if name not in derived]
        self.close()
        if left:
            raise ValueError(
                f"{self._checkpoint.folder}: {len(left)} tensors of the checkpoint belong to nothing in the model: "
                f"{listed(left, most=50)}"
            )
        self.report.derived = derived
        return self.report

    def close(self) -> None:
        self._bar.close()
        self._checkpoint.close()

    def _take(self, name: str) -> Tensor:
        """A view of the file, struck off the list of what is left."""
        if name not in self._checkpoint:
            near = difflib.get_close_matches(name, self._checkpoint, n=3, cutoff=0.5)
            hint = f"; it holds {listed(near)}" if near else ""
            raise ValueError(
                f"{self._checkpoint.folder}: tensor {name!r} is missing from the checkpoint{hint}"
            )
        assert name in self._left, f"{name} was taken twice"
        del self._left[name]
        self._bar.update(self._checkpoint.infos[name].nbytes)
        return self._checkpoint.tensor(name)

    def _plain(self, name: str, shape: tuple[int, ...]) -> Tensor:
        value = self._take(name)
        if value.shape != shape:
            raise ValueError(f"{name} must have the shape {list(shape)}, got {list(value.shape)}")
        if value.dtype not in PLAIN:
            raise ValueError(f"{name} must be a float tensor, got {value.dtype}")
        out = value.to(self.device, self.dtype, copy=True)
        # fp16 ends at 65504: a bf16 checkpoint may not fit, and would answer NaN
        if self.dtype == torch.float16 != value.dtype and not torch.isfinite(out).all():
            raise ValueError(
                f"{name} does not fit float16 (largest {value.abs().max().item():.3g}): choose bfloat16"
            )
        return out

    def _shard(
        self, module: str, in_features: int, out_features: int, online: bool = True
    ) -> Tensor | QuantWeight:
        """One module's weight, as stored or quantized here."""
        suffixes = self._reader.fields(module, self._checkpoint.infos)
        if not suffixes:
            plain = self._plain(f"{module}.weight", (out_features, in_features))
            if not online or self.quantization in AS_STORED:
                return plain
            return quantize(plain, ONLINE[self.quantization].fit(in_features))
        fields = {s: self._take(f"{module}.{s}") for s in suffixes}
        weight = self._reader.load(module, fields, out_features, in_features)
        self._check_stored(module, weight)
        return weight.to(self.device)

    def _check_stored(self, module: str, weight: QuantWeight) -> None:
        wanted = ONLINE[self.quantization].name if self.quantization in ONLINE else self.quantization
        if wanted not in ("auto", weight.scheme.name):
            raise ValueError(
                f"quantization must be auto or {weight.scheme.name} for this checkpoint, got {self.quantization!r}: "
                f"{module} is stored as {weight.scheme}"
            )

    def _prepare(self, weight: Tensor | QuantWeight, bias: Tensor | None) -> Prepared:
        """Packs for the kernel and books it."""
        note = ""
        prepared: Prepared
        if isinstance(weight, Tensor):
            prepared, scheme, kernel = prepare_linear(weight, bias), str(self.dtype)[6:], "linear"
            if prepared.form == "upcast":
                note = "computed in float32: this CPU has no 16-bit instructions"
        elif weight.scheme.bits == 8:
            prepared = prepare_w8a8(weight.codes_NK, weight.scale_NQ[:, 0].contiguous(), bias)
            scheme, kernel = str(weight.scheme), "gemm_w8a8"
        else:
            rows = weight.scheme.activations
            kind = "fp8" if rows is not None and rows.dtype == "fp8" else None
            prepared = prepare_w4a8(weight.codes_NK, weight.scale_NQ, weight.zero_NQ, bias, kind=kind)
            scheme, kernel = str(weight.scheme), "gemm_w4a8"
        if isinstance(prepared, W4Weight) and prepared.bits_stored != 4:
            note = f"int4 weights are unpacked to int{prepared.bits_stored} on the {self.device.type.upper()}"
        self._book(scheme, kernel, prepared, note)
        return prepared

    def _book(self, scheme: str, kernel: str, prepared: Prepared, note: str = "") -> None:
        row = self.report.rows.setdefault((scheme, kernel), ReportRow(scheme, kernel, note=note))
        row.layers += 1
        row.weights += prepared.in_features * prepared.out_features
        row.nbytes += prepared.nbytes


def _joined(
    shards: list[Tensor | QuantWeight], biases: list[Tensor | None]
) -> list[tuple[Tensor | QuantWeight, Tensor | None]]:
    """One (weight, bias) where all shards are of one kind, else each on its own."""
    given = [b for b in biases if b is not None]
    bias = torch.cat(given) if given else None
    if len(shards) == 1:
        return [(shards[0], bias)]
    plain = [s for s in shards if isinstance(s, Tensor)]
    if len(plain) == len(shards):
        return [(torch.cat(plain), bias)]
    quant = [s for s in shards if isinstance(s, QuantWeight)]
    fused = fuse(quant) if not plain else None
    return [(fused, bias)] if fused else list(zip(shards, biases, strict=True))
