"""A Llama in plain torch for quantization: its weights one layer at a time, and its forward pass with hooks.

`Source` reads a folder of safetensors, so that a model larger than memory can be worked on; `forward` runs one decoder
layer in the type of the weights.  Between the two stand folds and quantizers, which change a `Layer` in place.
A model whose `outer` tensors hold no head uses the embeddings as one (tied).
"""

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quant.formats.catalog import FORMATS
from quant.ptq.shape import Shape as Shape
from quant.ptq.shape import read_object
from quant.ptq.shape import read_shape as read_shape

Layer = dict[str, Tensor]  # by the name below "model.layers.N."
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
ATTENTION_NORM, MLP_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
EMBED, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# buffers that old exporters saved beside the weights; they follow from the config
DERIVED = ".rotary_emb.inv_freq"
# what quantized layers have beside or in place of a plain weight
QUANTIZED = tuple(f".{s}" for f in FORMATS for s in f.SUFFIXES if s != "weight")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Hooks:
    """What `forward` calls on its way; a subclass watches or replaces.  These leave everything as it is."""

    def input(self, name: str, x: Tensor) -> None:
        """Before each linear layer: its input [B, T, inputs].  q, k and v see one tensor, gate and up another."""

    def linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product of a linear layer."""
        return F.linear(x, weight, bias)

    def keys(self, k_BTGK: Tensor) -> None:
        """The keys before rotation."""

    def query(self, q_BTHK: Tensor) -> Tensor:
        """The queries after rotation."""
        return q_BTHK

    def kv(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """What the cache holds: keys after rotation, and values."""
        return k_BTGK, v_BTGK


PLAIN = Hooks()


class Source:
    """The weights of a model folder; `layer` and `outer` read from disk at each call and keep nothing."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.shape = read_shape(self.folder)
        config = self.folder / "config.json"
        for key in ("quantization_config", "compression_config"):
            if given := read_object(config).get(key):
                raise ValueError(
                    f"{config}: {key} must be absent, as quantization starts from plain weights, got {given!r:.120}"
                )
        self.files: dict[str, Path] = {}  # tensor -> file
        self.dtypes: dict[str, torch.dtype] = {}
        self.sizes: dict[str, tuple[int, ...]] = {}
        for path in _shards(self.folder):
            self._scan(path)
        self._check_names()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(torch.Size(s).numel() * self.dtypes[n].itemsize for n, s in self.sizes.items())

    @property
    def dtype(self) -> torch.dtype:
        """The type that the weights are stored in, of the embeddings where it varies."""
        return self.dtypes[EMBED]

    def layer(self, i: int, dtype: torch.dtype = torch.float32) -> Layer:
        """The tensors of decoder layer `i`, converted to `dtype`, in memory of their own."""
        if not 0 <= i < self.shape.layers:
            raise ValueError(f"{self.folder}: layer must be in [0, {self.shape.layers}), got {i}")
        prefix = f"model.layers.{i}."
        loaded = self._load([prefix + name for name in layer_sizes(self.shape)], dtype)
        return {name.removeprefix(prefix): value for name, value in loaded.items()}

    def outer(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Embeddings, last norm and, where it is not tied, the head."""
        return self._load(list(_outer_sizes(self.shape)), dtype)

    def _load(self, names: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for path in dict.fromkeys(self.files[name] for name in names):
            with safe_open(path, framework="pt") as file:
                for name in names:
                    if self.files[name] == path:
                        out[name] = file.get_tensor(name).to(dtype, copy=True)
        return {name: out[name] for name in names}

    def _scan(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  the handle is not a mapping
                    info = file.get_slice(name)
                    if name in self.files:
                        raise ValueError(f"{path}: holds {name!r}, and so does {self.files[name]}")
                    kind, shape = info.get_dtype(), tuple(info.get_shape())
                    if name.endswith(QUANTIZED) or (name.endswith(".weight") and kind not in FLOATS):
                        raise ValueError(
                            f"{self.folder} is already quantized ({name!r:.120} is {kind}): quantization starts from "
                            "plain weights, so give the model that it was made from"
                        )
                    if kind not in FLOATS:
                        raise ValueError(f"{path}: {name!r} must be of {', '.join(FLOATS)}, got {kind}")
                    self.files[name], self.dtypes[name], self.sizes[name] = path, FLOATS[kind], shape
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error!s:.200}") from error

    def _check_names(self) -> None:
        left = dict.fromkeys(n for n in self.files if not n.endswith(DERIVED))
        for prefix in itertools.chain([""], (f"model.layers.{i}." for i in range(self.shape.layers))):
            sizes = layer_sizes(self.shape) if prefix else _outer_sizes(self.shape)
            for name, size in ((prefix + n, s) for n, s in sizes.items()):
                if name not in left:
                    raise ValueError(f"{self.folder}: tensor {name!r} is missing")
                if self.sizes[name] != size:
                    raise ValueError(
                        f"{self.folder}: {name!r} must be {list(size)}, got {list(self.sizes[name])}"
                    )
                del left[name]
        extra = list(left)
        if self.shape.tied and HEAD in extra:
            extra.remove(HEAD)
            stored = self._load([EMBED, HEAD], self.dtypes[EMBED])
            if not torch.equal(stored[EMBED], stored[HEAD]):
                raise ValueError(
                    f"{self.folder}: {HEAD} differs from the embeddings, but the config ties them"
                )
        if extra:
            raise ValueError(
                f"{self.folder}: no place for tensor {extra[0]!r} ({len(extra)} such) in a Llama"
            )


def layer_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The tensors of a decoder layer and their sizes."""
    sizes: dict[str, tuple[int, ...]] = {ATTENTION_NORM: (shape.hidden,), MLP_NORM: (shape.hidden,)}
    for name in LINEARS:
        sizes[f"{name}.weight"] = shape.weight_shape(name)
        if shape.has_bias(name):
            sizes[f"{name}.bias"] = (shape.weight_shape(name)[0],)
    return sizes


def _outer_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    matrix = (shape.vocab, shape.hidden)
    sizes: dict[str, tuple[int, ...]] = {EMBED: matrix, FINAL_NORM: (shape.hidden,)}
    return sizes if shape.tied else sizes | {HEAD: matrix}


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise ValueError(
                f"{folder}: must hold one .safetensors file or {index.name}, got {len(files)} files"
            )
        return files
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must be an object of tensor -> file, got {weight_map!r:.80}")
    for name in weight_map.values():
        # a plain name beside the index: no way out of the folder
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise ValueError(f"{index}: every file must be a .safetensors file beside it, got {name!r:.80}")
    return [folder / name for name in dict.fromkeys(weight_map.values())]


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D


def rotate(x_BTXK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """RoPE on pairs (i, i + K / 2): x cos + (-x2, x1) sin."""
    half = x_BTXK.shape[-1] // 2
    turned = torch.cat((-x_BTXK[..., half:], x_BTXK[..., :half]), dim=-1)
    cos, sin = cos_TK[:, None].to(x_BTXK.dtype), sin_TK[:, None].to(x_BTXK.dtype)
    return x_BTXK * cos + turned * sin


def forward(layer: Layer, shape: Shape, x_BTD: Tensor, hooks: Hooks = PLAIN) -> Tensor:
    """One decoder layer on sequences that start at position 0; returns the residual stream after it."""
    h_BTD = rms_norm(x_BTD, layer[ATTENTION_NORM], shape.eps)
    x_BTD = x_BTD + _attention(layer, shape, h_BTD, hooks)
    h_BTD = rms_norm(x_BTD, layer[MLP_NORM], shape.eps)
    gate, up = (_linear(layer, f"mlp.{name}_proj", h_BTD, hooks) for name in ("gate", "up"))
    return x_BTD + _linear(layer, "mlp.down_proj", F.silu(gate) * up, hooks)


def _linear(layer: Layer, name: str, x: Tensor, hooks: Hooks) -> Tensor:
    hooks.input(name, x)
    return hooks.linear(name, x, layer[f"{name}.weight"], layer.get(f"{name}.bias"))


def _attention(layer: Layer, shape: Shape, x_BTD: Tensor, hooks: Hooks) -> Tensor:
    B, T, _ = x_BTD.shape
    q, k, v = (_linear(layer, f"self_attn.{name}_proj", x_BTD, hooks) for name in "qkv")
    k_BTGK = k.view(B, T, shape.kv_heads, shape.head_dim)
    hooks.keys(k_BTGK)
    cos_TK, sin_TK = shape.rope(torch.arange(T, device=x_BTD.device))
    q_BTHK = hooks.query(rotate(q.view(B, T, shape.heads, shape.head_dim), cos_TK, sin_TK))
    k_BTGK, v_BTGK = hooks.kv(rotate(k_BTGK, cos_TK, sin_TK), v.view(B, T, shape.kv_heads, shape.head_dim))
    mixed_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BTGK.transpose(1, 2).repeat_interleave(shape.heads_per_kv, dim=1),
        v_BTGK.transpose(1, 2).repeat_interleave(shape.heads_per_kv, dim=1),
        is_causal=True,
    )
    return _linear(layer, "self_attn.o_proj", mixed_BHTK.transpose(1, 2).reshape(B, T, -1), hooks)


def embed(outer: dict[str, Tensor], ids_BT: Tensor) -> Tensor:
    """The residual stream before the first layer."""
    return F.embedding(ids_BT, outer[EMBED])


def logits(outer: dict[str, Tensor], shape: Shape, x_BTD: Tensor) -> Tensor:
    """logits_BTV of the residual stream after the last layer."""
    return F.linear(rms_norm(x_BTD, outer[FINAL_NORM], shape.eps), outer.get(HEAD, outer[EMBED]))
