"""WeightSource: hands a model its weights by name, once each, and holds the file to account.

Strict: a tensor of the wrong shape, a missing one, and one that nobody took are errors that name it.  Layers are loaded
as the file has them (plain or quantized), or plain ones are quantized here, round to nearest; embeddings and norms stay
as they are, the head too unless it is asked for in 8 bits.  One projection at a time is in memory besides the result:
what has been taken is let go of in the mapped files too.
"""

import difflib
import itertools
import resource
import sys
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kernels.gemm_w8a8 import FP8, prepare_w8a8
from kernels.linear import prepare_linear
from kernels.quant_rows import quant_rows
from minserve.checkpoint import Checkpoint, listed
from minserve.linear import Linear, Prepared
from minserve.load_report import LoadReport
from minserve.overrides import CHANNEL, OnlineScheme, Overrides
from minserve.prepare import Ready, lacks_fp8, overflow, prepare_plain, prepare_quantized, short
from quant.formats import fireq
from quant.formats.catalog import PLAIN, recognise
from quant.rtn import quantize
from quant.scheme import ONLINE, QuantWeight, Scheme, fuse

# buffers that old exporters saved beside the weights; they follow from the config
DERIVED = (".rotary_emb.inv_freq",)
AS_STORED = ("auto", "none")
# what FireQ's checkpoints are asked to be, for products that are rounded as FireQ rounds them
AS_FIREQ = "w8a8-fp8"
# what the head may be quantized to, one scale a token and one an entry of the vocabulary
HEAD_DTYPES = {"int8": torch.int8, "fp8": FP8}
MOST_COMPARED = 4000  # names, for the one that a missing tensor may have been meant to have
# rows of it that are quantized at once: their float32 copy is small beside the head
ROWS_AT_ONCE = 4096


class WeightSource:
    """Reads `folder`; everything it returns is in `dtype` on `device` and owns its memory.

    `quantization` is auto (as stored), none (as stored, and that must be plain), or a scheme for a plain checkpoint; layers
    that `overrides` names are what it says.  Weight-only layers take the rows of a scheme with their bits.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        quantization: str = "auto",
        overrides: Overrides | None = None,
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
        self.overrides = overrides or Overrides()
        asked = {"lm_head": lm_head, "quantization": quantization}
        asked |= {f"quantization_overrides[{p}]": text for p, text in self.overrides.rules}
        for key, value in asked.items():
            if "fp8" in value and lacks_fp8(self.device):
                raise ValueError(f"{key} must be without fp8 on a GPU before sm_89, got {value!r}")
        self.quantization, self.lm_head = quantization, lm_head
        self.report = LoadReport()
        self._checkpoint = Checkpoint(folder)
        infos = self._checkpoint.infos
        self._reader = recognise(infos, quantization_config).settled(infos, self._checkpoint.tensor)
        own = set(self._reader.format.SUFFIXES) - {"weight"}
        # whoever quantized it left its plain layers plain on purpose
        self._quantized = any(name.rpartition(".")[2] in own for name in self._checkpoint)
        self._left = dict.fromkeys(self._checkpoint)
        self._held: list[str] = []
        self._zero_biases: list[str] = []
        self._plain_layers: list[str] = []
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
        self._let_go()
        return value

    def linear(
        self, names: tuple[str, ...], in_features: int, out_features: tuple[int, ...], bias: bool = False
    ) -> Linear:
        """The modules `names` stacked along their outputs; run one by one where their schemes differ."""
        assert len(names) == len(out_features), f"{names} and {out_features} differ in length"
        shards: list[Tensor | QuantWeight] = []
        biases: list[Tensor | None] = []
        for n, N in zip(names, out_features, strict=True):
            weight, factor = self._shard(n, in_features, N)
            shards.append(weight)
            biases.append(self._plain(f"{n}.bias", (N,)) * factor if bias else self._no_bias(n))
        stacked = _joined(names, shards, biases)
        del shards
        parts: list[Prepared] = []
        while stacked:
            parts.append(self._prepare(*stacked.pop(0)))
        self._let_go()
        return Linear(parts, self.dtype)

    def fields(self, module: str, suffixes: tuple[str, ...]) -> dict[str, Tensor]:
        """Those of the tensors beside `module` that the checkpoint has, by suffix, as stored."""
        return {s: self._take(f"{module}.{s}") for s in suffixes if f"{module}.{s}" in self._checkpoint}

    def head(self, name: str, embed_VD: Tensor, tied: bool) -> Linear:
        """The output projection; where tied, the embedding itself, and a stored copy must equal it."""
        V, D = embed_VD.shape
        stored = f"{name}.weight"
        weight: Tensor | QuantWeight = embed_VD
        self._no_bias(name)
        if not tied:
            weight, _ = self._shard(name, D, V, online=False)
        elif stored in self._checkpoint and not torch.equal(self._plain(stored, (V, D)), embed_VD):
            raise ValueError(f"{stored} differs from the embedding, but the config says tie_word_embeddings")
        head: Prepared
        if isinstance(weight, QuantWeight):
            if self.lm_head != "auto":
                raise ValueError(
                    f"lm_head must be auto for this checkpoint, got {self.lm_head!r}: it is stored as {weight.scheme}"
                )
            head = self._prepare(name, weight, None)
        elif self.lm_head in HEAD_DTYPES:
            head = self._head_in_8_bits(name, weight)
        elif tied:
            head = prepare_linear(weight)
            # a CPU packs weights for its matmul: then the head is a second copy of the embedding
            self.report.other_bytes += head.nbytes if head.form != "dense" else 0
        else:
            head = self._prepare(name, weight, None)
        self._let_go()
        return Linear([head], torch.float32)

    def _head_in_8_bits(self, name: str, weight_VD: Tensor) -> Prepared:
        parts = [quant_rows(rows, HEAD_DTYPES[self.lm_head]) for rows in weight_VD.split(ROWS_AT_ONCE)]
        scale_V = torch.cat([part.scale_T for part in parts])
        if not bool(torch.isfinite(scale_V).all()):
            raise ValueError(f"{name} must be finite to be quantized")
        head = prepare_w8a8(torch.cat([part.codes_TD for part in parts]), scale_V)
        sums = "int32" if self.lm_head == "int8" else "float32"
        words = f"dynamic {self.lm_head} rows x {self.lm_head} weights, {sums} sums"
        self.report.book(name, f"{name} {self.lm_head} (channel, symmetric)", Ready(head, "gemm_w8a8", words))
        return head

    def finish(self) -> LoadReport:
        """Ends the loading; raises ValueError naming every tensor that nobody took."""
        derived = [name for name in self._left if name.endswith(DERIVED)]
        left = [name for name in self._left if not name.endswith(DERIVED)]
        self.close()
        if left:
            raise ValueError(
                f"{self._checkpoint.folder}: {len(left)} tensors of the checkpoint belong to nothing in the model: "
                f"{listed(left, most=50)}"
            )
        self.overrides.check_used()
        if zero := self._zero_biases:
            self.report.remark(
                f"{len(zero)} biases are all zero and dropped, as the config has none: {listed(zero, most=3)}"
            )
        if plain := self._plain_layers:
            self.report.remark(
                f"{len(plain)} layers are plain although the config targets them: {listed(plain, most=3)}"
            )
        self.report.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        self.report.derived = derived
        return self.report

    def close(self) -> None:
        self._bar.close()
        self._checkpoint.close()

    def _let_go(self) -> None:
        """What was taken has been copied: its pages of the files need not stay."""
        for name in self._held:
            self._checkpoint.release(name)
        self._held.clear()

    def _take(self, name: str) -> Tensor:
        """A view of the file, struck off the list of what is left."""
        if name not in self._checkpoint:
            # comparing is slow, and a damaged header may have very many names, or very long ones
            names = [n for n in itertools.islice(self._checkpoint, MOST_COMPARED) if len(n) < 2 * len(name)]
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
            hint = f"; it holds {listed(near)}" if near else ""
            raise ValueError(
                f"{self._checkpoint.folder}: tensor {name!r} is missing from the checkpoint{hint}"
            )
        assert name in self._left, f"{name} was taken twice"
        del self._left[name]
        self._held.append(name)
        self._bar.update(self._checkpoint.infos[name].nbytes)
        return self._checkpoint.tensor(name)

    def _plain(self, name: str, shape: tuple[int, ...]) -> Tensor:
        value = self._take(name)
        if value.shape != shape:
            raise ValueError(f"{name} must have the shape {list(shape)}, got {list(value.shape)}")
        if value.dtype not in PLAIN:
            raise ValueError(f"{name} must be a float tensor, got {value.dtype}")
        out = value.to(self.device, self.dtype, copy=True)
        if value.dtype != self.dtype and (problem := overflow(value, out)):
            raise ValueError(f"{name} {problem}")
        return out

    def _no_bias(self, module: str) -> Tensor | None:
        """Where the config has no biases: one of zeros, which tools write beside every layer, is dropped; another stays
        among what is left over, an error in the end."""
        name = f"{module}.bias"
        if name in self._left and not bool(self._checkpoint.tensor(name).any()):
            self._take(name)
            self._zero_biases.append(name)
        return None

    def _shard(
        self, module: str, in_features: int, out_features: int, online: bool = True
    ) -> tuple[Tensor | QuantWeight, float]:
        """One module's weight, as stored or quantized here, and what its bias is to be multiplied with."""
        suffixes = self._reader.fields(module, self._checkpoint.infos)
        wanted = self.overrides.find(module) if online else None
        if wanted is None:
            as_stored = not online or (self._quantized and not suffixes)
            wanted = OnlineScheme("none" if as_stored else self.quantization)
        if not suffixes:
            if self._reader.targets(module):
                self._plain_layers.append(module)
            plain = self._plain(f"{module}.weight", (out_features, in_features))
            online = wanted.name not in AS_STORED
            return (quantize(plain, self._scheme(wanted, in_features)) if online else plain), 1.0
        fields = {s: self._take(f"{module}.{s}") for s in suffixes}
        weight = self._reader.load(module, fields, out_features, in_features)
        weight = self._as_wanted(module, weight, wanted.name if online else "auto").to(self.device)
        return weight, self._reader.bias_factor(fields)

    def _scheme(self, wanted: OnlineScheme, in_features: int) -> Scheme:
        scheme = ONLINE[wanted.name]
        group = wanted.group or self.overrides.group
        if scheme.group_size is not None and group is not None:
            scheme = replace(scheme, group_size=None if group == CHANNEL else int(group))
        return scheme.fit(in_features)

    def _as_wanted(self, module: str, weight: QuantWeight, wanted: str) -> QuantWeight:
        """The stored weight, with activations where it has none and they are asked for.

        w8a8-fp8 of FireQ's weights is FireQ's own arithmetic, at twice the memory.
        """
        stored, asked = weight.scheme, ONLINE.get(wanted)
        if wanted == "auto" or (asked and asked.name == stored.name):
            return weight
        as_published = self._reader.format is fireq and weight.scheme == fireq.SCHEME
        if as_published and wanted == AS_FIREQ:
            return fireq.rounded_products(weight)
        alike = asked and (asked.bits, asked.values) == (stored.bits, stored.values)
        if asked and alike and stored.activations is None and not stored.block:
            return replace(weight, scheme=replace(stored, activations=asked.activations))
        rows = {4: ("w4a8-int8", "w4a8-fp8"), 8: (f"w8a8-{'fp8' if stored.values == 'fp8' else 'int8'}",)}
        more = () if stored.activations or stored.block else rows[stored.bits]
        more = (AS_FIREQ,) if as_published else more
        raise ValueError(
            f"quantization must be {' or '.join(('auto', *(n for n in (stored.name, *more) if n in ONLINE)))} for this checkpoint, got {wanted!r}: "
            f"{module} is stored as {stored}"
        )

    def _prepare(self, name: str, weight: Tensor | QuantWeight, bias: Tensor | None) -> Prepared:
        """Packs for the kernel and books it."""
        if isinstance(weight, Tensor):
            ready, scheme = prepare_plain(weight, bias), short(self.dtype)
        else:
            try:
                ready, scheme = prepare_quantized(weight, bias, self.dtype), str(weight.scheme)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        self.report.book(name, scheme, ready)
        return ready.part


def _joined(
    names: tuple[str, ...], shards: list[Tensor | QuantWeight], biases: list[Tensor | None]
) -> list[tuple[str, Tensor | QuantWeight, Tensor | None]]:
    """One (name, weight, bias) where all shards are of one kind, else each on its own."""
    given = [b for b in biases if b is not None]
    bias = torch.cat(given) if given else None
    if len(shards) == 1:
        return [(names[0], shards[0], bias)]
    label = "|".join((names[0], *(n.rsplit(".", 1)[-1] for n in names[1:])))
    plain = [s for s in shards if isinstance(s, Tensor)]
    if len(plain) == len(shards):
        return [(label, torch.cat(plain), bias)]
    quant = [s for s in shards if isinstance(s, QuantWeight)]
    fused = fuse(quant) if not plain else None
    return [(label, fused, bias)] if fused else list(zip(names, shards, biases, strict=True))
