"""QServe (QoQ, arXiv 2405.04532) layers: 4-bit per channel, 4-bit in groups of 128 under an int8 channel, and W8A8.

Detected by tensors, since its files bring no config; `quant_method: qoq`, which people add by hand, is checked.
Codes lie in tiles of 32 outputs x 32 inputs, second-level scales permuted among each 32 outputs.  Two writers permute
them differently: `settled` finds out, once for the file, which it was.
W = (code * s2 + zero) * s1, code 0..15 and the sum mod 256; per channel W = code * s1 - szero.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant.scheme import GROUP_SIZES, INT8_ROWS, QuantWeight, Scheme

NAME = "qoq"
SUFFIXES: tuple[str, ...] = (
    "qweight", "s1_scales", "s1_szeros", "s2_scales", "s2_zeros", "weight", "dequant_scale"
)  # fmt: skip
TILE = 32
GROUP = 128
MAX_STEP = 17
OWN_SUFFIXES = (".s1_scales", ".s2_scales", ".dequant_scale")
LAYOUTS = {
    "groups": {"qweight", "s1_scales", "s2_scales", "s2_zeros"},
    "channel": {"qweight", "s1_scales", "s1_szeros"},
    "w8a8": {"weight", "dequant_scale"},
}
# how many times better centred the groups of one order must be to be it: those of a wrong one are 20 times off
CLEARLY = 2.0
OFTEN = 0.01  # of all groups that must leave int8 to speak against an order
SAMPLED_ROWS = 128  # outputs of each layer that are looked at for it
# what a config that people write may call an order of ORDERS
S2_ORDERS = {"kernel": "the kernels'", "deepcompressor": "deepcompressor's"}
# how far a zero point may be from a whole one and still be that, in steps of the codes: fp16 rounds 15 by 1/128
WHOLE = 1 / 64
# how far the nearest legal zero point may be from the stored one: less than what rounding to 4 bits costs on average
MAX_ZERO_ERROR = 1 / 16


@dataclass(frozen=True, slots=True)
class QoqConfig:
    """`bits` of the weights, None: the tensors decide; `group_size` None is one scale a channel; `order`: see ORDERS."""

    bits: int | None
    group_size: int | None
    order: str | None = None

    def __str__(self) -> str:
        return f"{self.bits}-bit {'channels' if self.group_size is None else f'groups of {self.group_size}'}"


def detect(infos: Mapping[str, Any], raw: Mapping[str, Any] | None) -> bool:
    """By the tensors that no other format has."""
    said = raw is not None and raw.get("quant_method") == NAME
    return said or any(name.endswith(OWN_SUFFIXES) for name in infos)


def read_config(raw: Mapping[str, Any] | None) -> QoqConfig | None:
    """The config added by hand, if any; ValueError where it says something else than the tensors can."""
    if raw is None:
        return None
    if raw.get("quant_method", NAME) != NAME:
        raise ValueError(
            f"quantization_config: quant_method must be {NAME!r} for QServe's tensors, got {raw['quant_method']!r:.80}"
        )
    bits, size = raw.get("wbits", 4), raw.get("group_size", -1)
    if type(bits) is not int or bits not in (4, 8):
        raise ValueError(f"quantization_config: wbits must be 4 or 8, got {bits!r:.80}")
    if type(size) is not int or size not in (-1, GROUP):
        raise ValueError(f"quantization_config: group_size must be -1 or {GROUP}, got {size!r:.80}")
    order = raw.get("s2_order")
    if order is not None and (not isinstance(order, str) or order not in S2_ORDERS):
        raise ValueError(
            f"quantization_config: s2_order must be one of {', '.join(S2_ORDERS)}, got {order!r:.80}"
        )
    return QoqConfig(bits, None if size == -1 else size, S2_ORDERS[order] if order else None)


def load(
    module: str, fields: Mapping[str, Tensor], out_features: int, in_features: int, config: QoqConfig | None
) -> QuantWeight:
    """The layer from its tensors by suffix; `module` is named by the caller."""
    N, K = out_features, in_features
    layout = next((name for name, suffixes in LAYOUTS.items() if suffixes == set(fields)), None)
    if layout is None:
        choices = "; or ".join(", ".join(sorted(s)) for s in LAYOUTS.values())
        raise ValueError(f"found tensors {', '.join(fields) or 'none'}; QServe has {choices}")
    has = QoqConfig(8 if layout == "w8a8" else 4, GROUP if layout == "groups" else None)
    if config is not None and config.bits and (config.bits, config.group_size) != (has.bits, has.group_size):
        raise ValueError(f"tensors hold {has}, but the config says {config}")
    if layout == "w8a8":
        codes_NK = _shaped(fields, "weight", (torch.int8,), [N, K])
        return QuantWeight(Scheme(8), codes_NK, _scales(fields, "dequant_scale", N)[:, None]).check()
    if N % TILE or K % TILE:
        raise ValueError(f"QServe's tiles need outputs and inputs in multiples of {TILE}, got {N} x {K}")
    codes_NK = untile(_shaped(fields, "qweight", (torch.int8,), [N, K // 2]), N, K)
    scale_N = _scales(fields, "s1_scales", N)
    if layout == "channel":
        return _channel(codes_NK, scale_N, _scales(fields, "s1_szeros", N)).check()
    if K % GROUP:
        raise ValueError(f"QServe's groups of {GROUP} do not divide {K} inputs")
    s2_QN, zeros_QN = (_shaped(fields, s, (torch.int8,), [K // GROUP, N]) for s in ("s2_scales", "s2_zeros"))
    step_NQ, offset_NQ = _second_level(codes_NK, s2_QN, zeros_QN, config.order if config else None)
    scheme = Scheme(4, GROUP, progressive=True)
    return QuantWeight(scheme, codes_NK, scale_N[:, None], step_NQ=step_NQ, offset_NQ=offset_NQ).check()


def targets(module: str, config: QoqConfig | None) -> bool:
    """Whether the config says that `module` is quantized."""
    return config is not None and config.bits is not None and module != "lm_head"


def _shaped(
    fields: Mapping[str, Tensor], suffix: str, dtypes: tuple[torch.dtype, ...], shape: list[int]
) -> Tensor:
    value = fields[suffix]
    if value.dtype not in dtypes or list(value.shape) != shape:
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{suffix} must be {kinds} {shape}, got {value.dtype} {list(value.shape)}")
    return value


def _scales(fields: Mapping[str, Tensor], suffix: str, N: int) -> Tensor:
    """float32 [N]; a trailing dimension of one is let through."""
    value = fields[suffix].flatten() if fields[suffix].numel() == N else fields[suffix]
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    value = _shaped({suffix: value}, suffix, kinds, [N]).float()
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{suffix} must be finite")
    return value


def untile(qweight: Tensor, N: int, K: int) -> Tensor:
    """Codes -8..7 [N, K] of int8 [N, K / 2], whose bytes are tiles of 32 x 32 codes, tile rows outermost.

    Of a byte's place in its tile, from the top: 3 bits output & 7, 2 bits input >> 2 & 3, 1 bit input >> 4, 1 bit
    output >> 3 & 1, 2 bits input & 3; its low nibble is the output of the tile's upper half, its high one 16 below.
    """
    x = qweight.contiguous().view(torch.uint8).view(N // TILE, K // TILE, 8, 4, 2, 2, 4)
    nibbles = torch.stack((x & 15, x >> 4))  # half, tile, tile, out8, in4, in16, out8s, in
    natural = nibbles.permute(1, 0, 6, 3, 2, 5, 4, 7).reshape(N, K)
    return (natural.view(torch.int8) - 8).contiguous()


def tile(codes_NK: Tensor) -> Tensor:
    """The inverse of `untile`."""
    N, K = codes_NK.shape
    x = (codes_NK + 8).view(torch.uint8).view(N // TILE, 2, 2, 8, K // TILE, 2, 4, 4)
    x = x.permute(1, 0, 4, 3, 6, 5, 2, 7)
    return (x[0] | x[1] << 4).contiguous().view(torch.int8).view(N, K // 2)


def _by_kernel(x_QN: Tensor) -> Tensor:
    """[N, Q] of rows whose place 4 i + j among 32 holds output 8 j + i: what QServe's kernels read."""
    return x_QN.view(len(x_QN), -1, 8, 4).transpose(2, 3).reshape(len(x_QN), -1).t().contiguous()


def _by_packer(x_QN: Tensor) -> Tensor:
    """[N, Q] of rows whose place 16 p + 2 i + r holds output 16 p + 8 r + i: what deepcompressor 0.1 writes."""
    return x_QN.view(len(x_QN), -1, 8, 2).transpose(2, 3).reshape(len(x_QN), -1).t().contiguous()


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {"the kernels'": _by_kernel, "deepcompressor's": _by_packer}


class Reading(NamedTuple):
    """The second level of one layer in one order: how many groups leave int8, and how far their means are from what
    the layer's rows and columns make of them."""

    step_NQ: Tensor
    offset_NQ: Tensor
    outside: int
    off: float


def _readings(codes_NK: Tensor, s2_QN: Tensor, zeros_QN: Tensor) -> dict[str, Reading]:
    """By the name of the order."""
    if int(s2_QN.min()) < 0 or int(s2_QN.max()) > MAX_STEP:
        raise ValueError(f"s2_scales must be 0..{MAX_STEP}, got {int(s2_QN.min())}..{int(s2_QN.max())}")
    Q, N = s2_QN.shape
    groups = codes_NK.view(N, Q, -1)
    low_NQ, high_NQ = ((e + 8).int() for e in torch.aminmax(groups, dim=-1))
    mean_NQ = groups.sum(-1, dtype=torch.int32) / groups.shape[-1] + 8
    readings = {}
    for name, natural in ORDERS.items():
        step_NQ = natural(s2_QN).int()
        # a byte stands for itself modulo 256: down to -255 in files of the paper's zero points, which are never above 0
        zero_NQ = -((-natural(zeros_QN).int()) % 256)
        fits_NQ = (low_NQ * step_NQ + zero_NQ >= -128) & (high_NQ * step_NQ + zero_NQ <= 127)
        above_NQ = (low_NQ * step_NQ + zero_NQ >= -384) & (high_NQ * step_NQ + zero_NQ <= -129)
        zero_NQ += 256 * (above_NQ & ~fits_NQ)
        off_NQ = mean_NQ * step_NQ + zero_NQ
        if Q > 1:
            # a whole row or column of the matrix may lie off 0 and say nothing
            off_NQ = off_NQ - off_NQ.mean(1, keepdim=True) - off_NQ.mean(0) + off_NQ.mean()
        outside = int((~fits_NQ & ~above_NQ).sum())
        off = float(off_NQ.double().square().sum())
        readings[name] = Reading(step_NQ, -zero_NQ - 8 * step_NQ, outside, off)
    return readings


@dataclass(slots=True)
class Evidence:
    """For each order, over the layers of a file: groups that leave int8, and the squares that `Reading.off` sums."""

    outside: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ORDERS, 0))
    off: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ORDERS, 0.0))
    groups: int = 0
    alike: bool = True  # no layer reads differently in the two

    def add(self, codes_NK: Tensor, s2_QN: Tensor, zeros_QN: Tensor) -> None:
        readings = _readings(codes_NK, s2_QN, zeros_QN)
        for name, reading in readings.items():
            self.outside[name] += reading.outside
            self.off[name] += reading.off
        self.groups += s2_QN.numel()
        one, other = readings.values()
        self.alike &= torch.equal(one.step_NQ, other.step_NQ) and torch.equal(one.offset_NQ, other.offset_NQ)

    def order(self) -> str:
        """The one whose groups are clearly better centred, else the only one that gives int8, where the other often does not.

        A group's zero point lies by the mean of its codes, that of another row does not.  ValueError where nothing tells:
        the range alone would mistake the order, as all groups of rotated weights use all codes.
        """
        kernels, _ = ORDERS
        if self.alike:
            return kernels
        best, other = sorted(ORDERS, key=lambda name: self.off[name])
        if self.off[best] * CLEARLY < self.off[other]:
            return best
        legal = [name for name in ORDERS if not self.outside[name]]
        if len(legal) == 1 and max(self.outside.values()) > OFTEN * self.groups:
            return legal[0]
        ratio = self.off[other] / self.off[best] if self.off[best] else 1.0
        counts = ", ".join(f"in {name} {self.outside[name]}" for name in ORDERS)
        raise ValueError(
            f"no known order of s2_scales and s2_zeros stands out: groups are {ratio:.2f} times better centred in {best}, "
            f"where {CLEARLY:g} times would tell, and of {self.groups} groups leave int8 {counts}; "
            f"say it by quantization_config, s2_order: {' or '.join(S2_ORDERS)}"
        )


def settled(
    config: QoqConfig | None, infos: Mapping[str, Any], tensor: Callable[[str], Tensor]
) -> QoqConfig | None:
    """`config` with the order of the second level that the whole file is written in, as the beginning of each layer tells.

    Whatever is no such layer, or none that can be read, is left to `load`, which names it.
    """
    modules = [n.removesuffix(".s2_scales") for n in infos if n.endswith(".s2_scales")]
    if not modules or (config is not None and config.order is not None):
        return config
    evidence = Evidence()
    for module in modules:
        parts = [f"{module}.{s}" for s in ("qweight", "s2_scales", "s2_zeros")]
        if any(p not in infos or infos[p].dtype != torch.int8 or len(infos[p].shape) != 2 for p in parts):
            continue
        (Q, N), (rows, half) = infos[parts[1]].shape, infos[parts[0]].shape
        if infos[parts[2]].shape != (Q, N) or rows != N or not Q or half * 2 != Q * GROUP or N % TILE:
            continue
        n = min(N, SAMPLED_ROWS)
        qweight, s2_QN, zeros_QN = (tensor(p) for p in parts)
        try:
            # tile rows lie one after the other: the first outputs are the first bytes
            evidence.add(untile(qweight[:n], n, 2 * half), s2_QN[:, :n], zeros_QN[:, :n])
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error
    return (
        QoqConfig(None, None, evidence.order()) if config is None else replace(config, order=evidence.order())
    )


def _second_level(
    codes_NK: Tensor, s2_QN: Tensor, zeros_QN: Tensor, order: str | None
) -> tuple[Tensor, Tensor]:
    """step int8 and offset int16 [N, Q], in `order`, or without one in that which the layer itself tells."""
    if order is None:
        evidence = Evidence()
        evidence.add(codes_NK, s2_QN, zeros_QN)
        order = evidence.order()
    readings = _readings(codes_NK, s2_QN, zeros_QN)
    if readings[order].outside:
        counts = ", ".join(f"in {name} {r.outside}" for name, r in readings.items())
        raise ValueError(
            f"s2_scales and s2_zeros in {order} order, that of the file, must give int8 weights: of {s2_QN.numel()} groups "
            f"leave int8 {counts}"
        )
    return readings[order].step_NQ.to(torch.int8), readings[order].offset_NQ.to(torch.int16)


def _channel(codes_NK: Tensor, scale_N: Tensor, szero_N: Tensor) -> QuantWeight:
    """szero = zero * scale.  Whole zeros 0..15 are zero points; others need a finer grid: see `_finer`."""
    if bool(((scale_N == 0) & (szero_N != 0)).any()) or bool((scale_N < 0).any()):
        raise ValueError("s1_scales must be above 0 where s1_szeros are not 0")
    scale = torch.where(scale_N == 0, 1, scale_N).double()
    zero_N = torch.where(scale_N == 0, 8, szero_N.double() / scale)
    whole_N = zero_N.round()
    if (
        bool(((zero_N - whole_N).abs() > WHOLE).any())
        or not 0 <= int(whole_N.min()) <= int(whole_N.max()) <= 15
    ):
        return _finer(codes_NK, scale_N, zero_N)
    zero_NQ = (whole_N - 8).to(torch.int8)[:, None]
    if not bool(zero_NQ.any()):
        return QuantWeight(Scheme(4), codes_NK, scale_N[:, None])
    return QuantWeight(Scheme(4, symmetric=False), codes_NK, scale_N[:, None], zero_NQ)


def _finer(codes_NK: Tensor, scale_N: Tensor, zero_N: Tensor) -> QuantWeight:
    """Zero points between the codes, as writers leave that subtract them after the scale: steps of a finer scale.

    (code * step - offset) * (scale / step), the step of a row being that of 1..17 whose offset is nearest to
    zero * step while all is an int8.  Exact enough is `MAX_ZERO_ERROR`; ValueError, with the error, beyond it.
    """
    N, K = codes_NK.shape
    low_N, high_N = ((e + 8).int() for e in torch.aminmax(codes_NK, dim=1))
    error_N = torch.full_like(zero_N, torch.inf)
    step_N, taken_N = torch.ones_like(low_N), torch.zeros_like(low_N)
    for step in range(MAX_STEP, 0, -1):
        offset_N = (zero_N * step).round().clamp(-(1 << 20), 1 << 20).int()
        legal_N = (high_N * step - offset_N <= 127) & (low_N * step - offset_N >= -128)
        legal_N &= (offset_N >= 0) & (offset_N <= 255)
        here_N = torch.where(legal_N, (zero_N - offset_N / step).abs(), torch.inf)
        better_N = here_N < error_N
        error_N = torch.where(better_N, here_N, error_N)
        step_N, taken_N = torch.where(better_N, step, step_N), torch.where(better_N, offset_N, taken_N)
    worst = int(error_N.argmax())
    if float(error_N[worst]) > MAX_ZERO_ERROR:
        raise ValueError(
            f"s1_szeros: the zero point {float(zero_N[worst]):.4g} of output {worst} has no int8 form nearer than "
            f"{float(error_N[worst]):.3g} steps; at most {MAX_ZERO_ERROR} is allowed"
        )
    group = next((g for g in GROUP_SIZES if K % g == 0), TILE)
    spread = (N, K // group)
    return QuantWeight(
        Scheme(4, group, progressive=True),
        codes_NK,
        (scale_N / step_N)[:, None],
        step_NQ=step_N.to(torch.int8)[:, None].expand(spread).contiguous(),
        offset_NQ=(taken_N - 8 * step_N).to(torch.int16)[:, None].expand(spread).contiguous(),
    )


def save(weight: QuantWeight) -> dict[str, Tensor]:
    """The tensors of one layer by suffix: progressive groups of 128, 4-bit channels, or int8 channels.

    ValueError where the scheme or the shape is none of QServe's, or the scales are not float16.
    """
    scheme, (N, K) = weight.scheme, weight.codes_NK.shape
    grain = scheme.group_size == (GROUP if scheme.progressive else None)
    if scheme.activations != INT8_ROWS or scheme.values != "int" or not grain or weight.order_K is not None:
        raise ValueError(
            f"QServe holds int8 channels, 4-bit channels and progressive groups of {GROUP} for dynamic int8 rows, "
            f"columns in order, got {scheme}"
        )
    scale_N = _half(weight.scale_NQ[:, 0])
    if scheme.bits == 8:
        return {"weight": weight.codes_NK, "dequant_scale": scale_N}
    if N % TILE or K % TILE:
        raise ValueError(f"QServe's tiles need outputs and inputs in multiples of {TILE}, got {N} x {K}")
    fields = {"qweight": tile(weight.codes_NK), "s1_scales": scale_N}
    if weight.step_NQ is None or weight.offset_NQ is None:
        zero_N = 8 if weight.zero_NQ is None else weight.zero_NQ[:, 0] + 8
        return fields | {"s1_szeros": _finite((zero_N * weight.scale_NQ[:, 0]).half())}
    zeros_NQ = -weight.offset_NQ.int() - 8 * weight.step_NQ.int()
    bytes_NQ = (zeros_NQ % 256).to(torch.uint8).view(torch.int8)
    return fields | {"s2_scales": _permuted(weight.step_NQ), "s2_zeros": _permuted(bytes_NQ)}


def _permuted(x_NQ: Tensor) -> Tensor:
    """The inverse of `_by_kernel`."""
    x_QN = x_NQ.t().contiguous()
    return x_QN.view(len(x_QN), -1, 4, 8).transpose(2, 3).reshape(x_QN.shape).contiguous()


def _half(scale: Tensor) -> Tensor:
    half = scale.half()
    if not torch.equal(half.float(), scale):
        raise ValueError("scales do not fit float16: quantize with scale_dtype=float16")
    return half


def _finite(value: Tensor) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise ValueError("zero points times scales do not fit float16")
    return value


def config_object(scheme: Scheme) -> dict[str, Any]:
    """The quantization_config that SGLang asks for; QServe itself reads none."""
    return {"quant_method": NAME, "wbits": scheme.bits, "group_size": scheme.group_size or -1}
