"""GPTQ layers, as AutoGPTQ and GPTQModel write them: 4-bit weights in groups or by channel, activations left alone.

`qweight` int32 [K / 8, N], nibble i of word r input row 8 r + i; `qzeros` int32 [Q, N / 8]; `scales` [Q, N]; `g_idx`
int32 [K], the group of each input (desc_act).  W = (code - zero) * scale, codes and zeros 0..15.  Version 1 stores
zero - 1, version 2 (`checkpoint_format: gptq_v2`) the zero itself: without a config only symmetric layers, whose zeros
are 8, tell which it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.pack import num_words, unpack
from quant.scheme import QuantWeight, Scheme

NAME = "gptq"
SUFFIXES: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
# what is added to a stored zero point
VERSIONS = {"gptq": 1, "gptq_v2": 0}
MAX_GROUP = 1 << 24  # more inputs than any layer has


@dataclass(frozen=True, slots=True)
class GptqConfig:
    """`added` None: the config does not say which version it is; `group_size` None: a scale a channel."""

    added: int | None
    group_size: int | None
    symmetric: bool | None
    uniform: bool  # False: the config has modules of their own settings


def is_gptq(infos: Mapping[str, Any]) -> bool | None:
    """Whether words of codes run along the inputs; None where there are no such layers."""
    for name, info in infos.items():
        scales = infos.get(name.removesuffix("qweight") + "scales")
        if name.endswith(".qweight") and info.dtype == torch.int32 and scales is not None:
            # the other, AWQ, has a word for 8 outputs
            return bool(info.shape[-1:] == scales.shape[-1:])
    return None


def detect(infos: Mapping[str, Any], raw: Mapping[str, Any] | None) -> bool:
    """By the direction of the words, and by the config where there are none."""
    found = is_gptq(infos)
    return found if found is not None else raw is not None and raw.get("quant_method") == NAME


def read_config(raw: Mapping[str, Any] | None) -> GptqConfig | None:
    """ValueError naming the key for other bits, other layouts (marlin) and other methods."""
    if raw is None:
        return None
    version = raw.get("checkpoint_format")
    for key, value, choices in (
        ("quant_method", raw.get("quant_method", NAME), (NAME,)),
        ("bits", raw.get("bits", 4), (4,)),
        ("checkpoint_format", version if version is not None else "gptq", tuple(VERSIONS)),
        ("sym", raw.get("sym"), (True, False, None)),
    ):
        if not any(value is c or (value == c and type(value) is type(c)) for c in choices):
            names = ", ".join(map(repr, choices))
            raise ValueError(
                f"quantization_config: {key} must be one of {names} for GPTQ's tensors, got {value!r:.80}"
            )
    size = read_group_size(raw.get("group_size", -1))
    added = None if version is None else VERSIONS[version]
    return GptqConfig(added, size, raw.get("sym"), not raw.get("dynamic"))


def read_group_size(value: Any) -> int | None:
    """None for -1, one scale a channel."""
    if type(value) is not int or not (value == -1 or 0 < value < MAX_GROUP):
        raise ValueError(f"quantization_config: group_size must be -1 or above 0, got {value!r:.80}")
    return None if value == -1 else value


def load(
    module: str, fields: Mapping[str, Tensor], out_features: int, in_features: int, config: GptqConfig | None
) -> QuantWeight:
    """The layer from its tensors by suffix; `order_K` where g_idx scatters the groups over the inputs."""
    N, K = out_features, in_features
    scale_NQ = check_fields(fields, (num_words(K, 4), N), N, K)
    Q = scale_NQ.shape[1]
    zero_NQ = unpack(fields["qzeros"], 4, N).t() + 8
    added = _added(zero_NQ, config)
    # a zero of 0 is stored as -1 in version 1, of which four bits are left: 15
    zero_NQ = (zero_NQ + added) % 16 - 8
    symmetric = not bool(zero_NQ.any())
    if config and config.uniform:
        if config.symmetric and not symmetric:
            raise ValueError(
                f"qzeros must all mean 8 under sym, got {int(zero_NQ.min()) + 8}..{int(zero_NQ.max()) + 8}"
            )
        want = 1 if config.group_size is None else K / config.group_size
        if want != Q:
            raise ValueError(
                f"scales hold {Q} groups, but the config says group_size {config.group_size} of {K} inputs"
            )
    codes_NK, order_K = unpack(fields["qweight"].t(), 4, K), _order(fields.get("g_idx"), K, Q)
    scheme = Scheme(4, None if Q == 1 else K // Q, symmetric, activations=None)
    return QuantWeight(
        scheme,
        codes_NK if order_K is None else codes_NK[:, order_K].contiguous(),
        scale_NQ,
        None if symmetric else zero_NQ.contiguous(),
        order_K=order_K,
    ).check()


def targets(module: str, config: GptqConfig | None) -> bool:
    """Whether the config says that `module` is quantized; of modules of their own settings it is not asked."""
    return config is not None and config.uniform and module != "lm_head"


def check_fields(fields: Mapping[str, Tensor], words: tuple[int, int], N: int, K: int) -> Tensor:
    """The scales as float32 [N, Q], once all shapes and types are right; `words` is the shape of qweight."""
    if missing := {"qweight", "qzeros", "scales"} - set(fields):
        raise ValueError(f"{', '.join(sorted(missing))} missing; found {', '.join(fields)}")
    if N % 8 or K % 8:
        raise ValueError(f"words of 8 codes need outputs and inputs in multiples of 8, got {N} x {K}")
    qweight, qzeros, scales = (fields[s] for s in ("qweight", "qzeros", "scales"))
    if qweight.dtype != torch.int32 or qweight.shape != words:
        raise ValueError(
            f"qweight must be int32 {list(words)} for 4-bit codes (other bits are not supported), "
            f"got {qweight.dtype} {list(qweight.shape)}"
        )
    Q = scales.shape[0] if scales.ndim == 2 else 0
    if not scales.dtype.is_floating_point or not Q or scales.shape[1] != N or K % Q:
        raise ValueError(
            f"scales must be floats [groups of {K} inputs, {N}], got {scales.dtype} {list(scales.shape)}"
        )
    if qzeros.dtype != torch.int32 or list(qzeros.shape) != [Q, num_words(N, 4)]:
        raise ValueError(
            f"qzeros must be int32 {[Q, num_words(N, 4)]}, got {qzeros.dtype} {list(qzeros.shape)}"
        )
    return scales.float().t().contiguous()


def _added(stored_NQ: Tensor, config: GptqConfig | None) -> int:
    """1 or 0, by the config; where it is silent, symmetric layers answer, and otherwise version 1 is the custom."""
    if config and config.added is not None:
        return config.added
    low, high = int(stored_NQ.min()), int(stored_NQ.max())
    if (low, high) in ((7, 7), (8, 8)) and (config is None or config.symmetric is not False):
        return 8 - low
    if config is None:
        raise ValueError(
            f"qzeros are {low}..{high}, and there is no config to say whether they are stored less one: "
            "quantization_config needs quant_method gptq and checkpoint_format gptq or gptq_v2"
        )
    return VERSIONS["gptq"]


def _order(g_idx: Tensor | None, K: int, Q: int) -> Tensor | None:
    """int64 [K], the inputs group by group, each group's in the order they come; None where they lie so already."""
    if g_idx is None:
        return None
    if g_idx.is_floating_point() or list(g_idx.shape) != [K]:
        raise ValueError(f"g_idx must be integers {[K]}, got {g_idx.dtype} {list(g_idx.shape)}")
    order_K = g_idx.long().argsort(stable=True)
    if not torch.equal(g_idx.long()[order_K], torch.arange(K) // (K // Q)):
        raise ValueError(f"g_idx must name each of {Q} groups {K // Q} times")
    return None if torch.equal(order_K, torch.arange(K)) else order_K
