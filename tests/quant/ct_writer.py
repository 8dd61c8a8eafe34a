"""Checkpoints as the compressed-tensors package itself writes them: one layer, or a whole model with calibration."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor, compress_module
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor
from torch.nn import Linear, Module
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

BLOCK = 128


def extremes(w_NK: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of everything that shares a scale, in the shape of the scales."""
    N, K = w_NK.shape
    if args.strategy == "tensor":
        return w_NK.min().view(1), w_NK.max().view(1)
    if args.strategy == "block":
        rows, columns = -(-N // BLOCK) * BLOCK, -(-K // BLOCK) * BLOCK
        padded = w_NK.new_zeros(rows, columns)
        padded[:N, :K] = w_NK
        tiles = padded.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        return tiles.amin((1, 3)), tiles.amax((1, 3))
    w_NQg = w_NK.view(N, -1, args.group_size if args.strategy == "group" else K)
    return w_NQg.amin(-1), w_NQg.amax(-1)


def set_constants(module: Module, name: str, low: Tensor, high: Tensor, args: QuantizationArgs) -> None:
    scale, zero = calculate_qparams(low, high, args)
    stored = getattr(module, f"{name}_scale")
    if stored.numel() != scale.numel():
        # one a head, each its own: any scale that covers the range will do
        scale = scale * torch.linspace(1, 1.5, stored.numel(), dtype=scale.dtype)
    stored.data.copy_(scale.view(stored.shape))
    zeros = getattr(module, f"{name}_zero_point", None)
    if zeros is not None:
        zeros.data.copy_(zero.view(zeros.shape) if zeros.numel() == zero.numel() else zero)


def written_layer(
    w_NK: Tensor, x_TK: Tensor, weights: Mapping[str, Any], rows: Mapping[str, Any] | None, fmt: str
) -> dict[str, Tensor]:
    """The tensors of one linear layer, its static input constants from `x_TK`."""
    N, K = w_NK.shape
    layer = Linear(K, N, bias=False, dtype=w_NK.dtype)
    layer.weight.data.copy_(w_NK)
    inputs = None if rows is None else QuantizationArgs(**rows)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=inputs
    )
    initialize_module_for_quantization(layer, scheme)
    assert scheme.weights is not None
    set_constants(layer, "weight", *extremes(w_NK, scheme.weights), scheme.weights)
    if inputs is not None and not inputs.dynamic:
        set_constants(layer, "input", x_TK.min(), x_TK.max(), inputs)
    compress_module(layer, fmt)
    return {name: value.detach().contiguous() for name, value in layer.state_dict().items()}


def write_model(plain: Path, out: Path, config: Mapping[str, Any], ids: list[int]) -> Tensor:
    """Writes the model of `plain` quantized by `config` to `out`; returns the package's own logits of `ids`.

    Ranges of inputs, keys and values are those of the same tokens.
    """
    model = AutoModelForCausalLM.from_pretrained(plain)
    seen = _ranges(model, ids)
    apply_quantization_config(model, QuantizationConfig(**config))
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        if scheme.weights is not None:
            set_constants(module, "weight", *extremes(module.weight.data, scheme.weights), scheme.weights)
        inputs = scheme.input_activations
        if inputs is not None and not inputs.dynamic:
            for kind in ("k", "v") if name.endswith("self_attn") else ("input",):
                key = f"{name}.{kind}_proj" if kind != "input" else name
                set_constants(module, kind, *seen[key, kind != "input"], inputs)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(str(out))
    return _logits(model, ids)


def _ranges(model: Module, ids: list[int]) -> dict[tuple[str, bool], tuple[Tensor, Tensor]]:
    """Smallest and largest input (False) and output (True) of every linear layer.

    A rotation keeps pairs of a key's channels within their length, at most sqrt 2 above the larger.
    """
    seen: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(_: Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen[name, False] = (args[0].min(), args[0].max())
            reach = out.abs().max() * 2**0.5
            seen[name, True] = (-reach, reach)

        return hook

    hooks = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, Linear)]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return seen


def package_logits(path: Path, ids: list[int], dequantize: bool = False) -> Tensor:
    """What transformers and compressed-tensors make of a checkpoint; `dequantize`: of its weights alone.

    That is the one way in which transformers 5.23 reads packed zero points.
    """
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    return _logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options), ids)


def _logits(model: Module, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def quantization_config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())["quantization_config"]
