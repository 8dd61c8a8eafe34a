"""int4 weights as the GPU reads them.

Inputs are taken in pairs of groups: byte j of a pair is code j of the even group | code j of the odd one << 4, rows of
outputs one after the other.  A group wider than 128 is cut, its scale repeated, and one that is no multiple of 32 is
filled up, so that the two halves of CHUNK bytes are two whole groups for the tensor core.  Beside the codes lie, one row
a pair and one column an output, the float32 scales (`group`, `fp8`) or an int32 with the small integers of both groups.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import cdiv

# operands of a wider dot would not fit in registers
MAX_GROUP = 128
# what one instruction of the tensor core multiplies
MIN_CHUNK = 32
# of a byte of e4m3 that holds 2 q: its value is q / 256
E4M3_UNIT = 256.0
# of a code in the high half of a byte
HIGH_UNIT = 16.0
FP8 = torch.float8_e4m3fn
KINDS = ("group", "progressive", "channel", "fp8")


@dataclass(frozen=True, slots=True)
class Int4:
    """The canonical weight: (code - zero) * step * scale, codes and zeros -8..7, one step and zero a group.

    `step_NQ` (progressive) are integers, with one scale an output; `offset_NQ` is zero * step, or whatever else is
    taken off code * step.
    """

    codes_NK: Tensor
    scale_NQ: Tensor
    zero_NQ: Tensor | None = None
    step_NQ: Tensor | None = None
    offset_NQ: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Packed4:
    """`decode` names the arithmetic of kernels/w4_decode.py; `meta_PN` its integers; `scale` [N], or [2 P, N] by group."""

    decode: str
    codes: Tensor
    meta_PN: Tensor | None
    scale: Tensor
    arrivals: Tensor
    group: int
    chunk: int

    @property
    def by_group(self) -> bool:
        return self.scale.dim() == 2

    @property
    def nbytes(self) -> int:
        meta = 0 if self.meta_PN is None else self.meta_PN.nbytes
        return self.codes.nbytes + self.scale.nbytes + meta + self.arrivals.nbytes


def cut_group(group_size: int) -> int:
    """The widest part of a group that one dot takes: a power of two from 32 on if there is one, else any divisor."""
    whole = [g for g in (128, 64, 32) if group_size % g == 0]
    return (whole or [g for g in range(min(group_size, MAX_GROUP), 0, -1) if group_size % g == 0])[0]


def chunk_of(group: int) -> int:
    """Bytes a pair of groups takes up in a row."""
    return max(MIN_CHUNK, 1 << (group - 1).bit_length())


def unit(n: int) -> int:
    """A divisor of `n` that a kernel is told, so that one binary serves all that have it."""
    return 16 if n % 16 == 0 else 1


def pair_up(nibbles_NK: Tensor, group: int) -> Tensor:
    """uint8 [N, pairs * chunk] of uint8 codes 0..15.  Filled up with copies: what is legal in a group stays so."""
    N, chunk = nibbles_NK.shape[0], chunk_of(group)
    x_NQG = nibbles_NK.view(N, -1, group)
    if chunk > group:
        x_NQG = torch.cat([x_NQG, x_NQG[..., :1].expand(-1, -1, chunk - group)], dim=2)
    x_NQG = F.pad(x_NQG, (0, 0, 0, x_NQG.shape[1] % 2))
    x_NPHG = x_NQG.reshape(N, -1, 2, chunk)
    return (x_NPHG[:, :, 0] | x_NPHG[:, :, 1] << 4).reshape(N, -1)


def unpair(packed: Tensor, group: int, in_features: int) -> Tensor:
    """What `pair_up` was given."""
    N, chunk = packed.shape[0], chunk_of(group)
    x_NPG = packed.view(N, -1, chunk)
    x_NPHG = torch.stack([x_NPG & 15, x_NPG >> 4], dim=2)
    return x_NPHG[..., :group].reshape(N, -1)[:, :in_features]


def by_pair(x_NQ: Tensor, fill: int = 0) -> Tensor:
    """[P, N, 2] in int32 of integers by group."""
    x_NQ = F.pad(x_NQ.int(), (0, x_NQ.shape[1] % 2), value=fill)
    return x_NQ.view(x_NQ.shape[0], -1, 2).transpose(0, 1)


def pack_zeros(zero_NQ: Tensor) -> Tensor:
    """Zero points 0..15 of two groups in an int32."""
    z_PN2 = by_pair(zero_NQ)
    return (z_PN2[..., 0] | z_PN2[..., 1] << 8).contiguous()


def pack_steps(step_NQ: Tensor, offset_NQ: Tensor) -> Tensor:
    """step | offset << 8 of two groups in an int32; offsets 0..255 are taken off u * step, u = code + 8."""
    s, o = by_pair(step_NQ, fill=1), by_pair(offset_NQ)
    return (s[..., 0] | o[..., 0] << 8 | s[..., 1] << 16 | o[..., 1] << 24).contiguous()


def encode_e4m3(codes_NK: Tensor) -> Tensor:
    """The nibble whose two parts E4M3 puts together: magnitude, less one where negative, << 1 | sign."""
    negative = codes_NK < 0
    return (torch.where(negative, -1 - codes_NK, codes_NK) << 1 | negative).to(torch.uint8)


def fireq_products(codes_NK: Tensor, scale_NQ: Tensor) -> Tensor:
    """e4m3 [N, K]: codes times e4m3 scales, rounded to e4m3 as FireQ (arXiv 2505.20839) has it, from 16 products a group.

    For prepare_w8a8: its arithmetic bit for bit, at 8 bits a weight.  Kind `fp8` does not round them, and keeps 4 bits.
    """
    (N, K), Q = codes_NK.shape, scale_NQ.shape[1]
    wide_NQ1 = scale_NQ.float()[:, :, None]
    if float(wide_NQ1.abs().max()) > 56.0:
        raise ValueError(
            f"scales must be at most 56, so that 8 of them are an e4m3, got {float(wide_NQ1.max())}"
        )
    table_NQ16 = (torch.arange(-8, 8, device=codes_NK.device) * wide_NQ1).to(FP8).view(torch.uint8)
    index_NQG = (codes_NK.view(N, Q, K // Q) + 8).long()
    return table_NQ16.gather(2, index_NQG).view(N, K).view(FP8)


def progressive_offset(w: Int4) -> Tensor:
    """What is taken off u * step, in int32; raises where a value would not be an int8."""
    assert w.step_NQ is not None, "no steps"
    step = w.step_NQ.int()
    zero = 0 if w.zero_NQ is None else w.zero_NQ.int()
    offset = 8 * step + (zero * step if w.offset_NQ is None else w.offset_NQ.int())
    if int(step.min()) < 0 or int(step.max()) > 17:
        raise ValueError(f"steps must be 0..17, got {int(step.min())}..{int(step.max())}")
    if int(offset.min()) < 0 or int(offset.max()) > 255:
        low, high = int((offset - 8 * step).min()), int((offset - 8 * step).max())
        raise ValueError(f"zero * step must be -8 * step..255 - 8 * step, got {low}..{high}")
    values = widened(w)
    if int(values.min()) < -128 or int(values.max()) > 127:
        raise ValueError(
            f"(code - zero) * step must be -128..127, got {int(values.min())}..{int(values.max())}"
        )
    return offset


def widened(w: Int4) -> Tensor:
    """(code - zero) * step as int32: what multiplies the scale."""
    (N, K), Q = w.codes_NK.shape, w.scale_NQ.shape[1]
    for part in (w.zero_NQ, w.step_NQ):
        Q = Q if part is None else part.shape[1]
    x_NQG = w.codes_NK.int().view(N, Q, -1)
    step = 1 if w.step_NQ is None else w.step_NQ.int()[:, :, None]
    if w.offset_NQ is not None:
        return (x_NQG * step - w.offset_NQ.int()[:, :, None]).view(N, K)
    zero = 0 if w.zero_NQ is None else w.zero_NQ.int()[:, :, None]
    return ((x_NQG - zero) * step).view(N, K)


def pack(kind: str, w: Int4) -> Packed4:
    """For the GPU."""
    (N, K), device = w.codes_NK.shape, w.codes_NK.device
    whole = K if kind == "channel" else K // (w.scale_NQ if w.step_NQ is None else w.step_NQ).shape[1]
    group = cut_group(whole)

    def spread(x_NQ: Tensor) -> Tensor:
        return x_NQ.repeat_interleave(whole // group, dim=1)

    def by_group(scale_NQ: Tensor) -> Tensor:
        return F.pad(spread(scale_NQ.float()).t(), (0, 0, 0, K // group % 2)).contiguous()

    unsigned = (w.codes_NK + 8).view(torch.uint8)
    meta = None
    if kind == "progressive" or (kind == "channel" and w.zero_NQ is not None):
        if w.step_NQ is None:
            w = Int4(w.codes_NK, w.scale_NQ, w.zero_NQ, torch.ones_like(w.scale_NQ, dtype=torch.int32))
        assert w.step_NQ is not None
        meta = pack_steps(spread(w.step_NQ), spread(progressive_offset(w)))
        decode, nibbles, scale = "progressive", unsigned, w.scale_NQ[:, 0].float().contiguous()
    elif kind == "channel":
        decode, nibbles = "symmetric", w.codes_NK.view(torch.uint8) & 15
        scale = w.scale_NQ[:, 0].float() / HIGH_UNIT
    elif kind == "fp8":
        decode, nibbles, scale = "e4m3", encode_e4m3(w.codes_NK), by_group(w.scale_NQ * E4M3_UNIT)
    elif w.zero_NQ is None:
        decode, nibbles = "symmetric", w.codes_NK.view(torch.uint8) & 15
        scale = by_group(w.scale_NQ / HIGH_UNIT)
    else:
        decode, nibbles, scale = "zeros", unsigned, by_group(w.scale_NQ)
        meta = pack_zeros(spread(w.zero_NQ.int() + 8))
    arrivals = torch.zeros(2 * cdiv(N, 64), dtype=torch.int32, device=device)
    return Packed4(decode, pair_up(nibbles, group), meta, scale, arrivals, group, chunk_of(group))
