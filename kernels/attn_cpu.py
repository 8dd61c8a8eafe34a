"""Attention over the paged pool with torch's own CPU kernels: gather rows, convert the codes once, two batched matmuls.

Everything is computed in fp32 (on a CPU without bf16 units that is as fast as bf16).  Quantized formats: a key's scale
multiplies its score and a value's scale its probability, so codes are only converted, never dequantized; a zero adds
its multiple of a query's sum to a score, and what the probabilities weigh all of them to, to an output.
Lanes past a sequence's length may hold NaN: scores there are overwritten, and values (or their scales) are zeroed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.kv_layout import KvLayout
from kernels.kv_read import FLOAT_DTYPES
from kernels.kv_rows import Chunk, DecodeGroup
from kernels.kv_step import KvStep

SIGNS = -0x7F7F7F7F7F7F7F80  # the uppermost bit of 8 bytes: 128 more or less, modulo 256
FP8_EXPONENTS = (
    256.0  # e4m3 bits are those of an fp16 with 2 more bits of exponent, whose value is this much smaller
)


class PartReader:
    """Gathers keys, values and scales of whole blocks as fp32; buffers are reused from group to group of a layer."""

    def __init__(self, pool: Tensor, layout: KvLayout, most_blocks: int) -> None:
        self.layout = layout
        words = pool.view(torch.int64)
        self.keys = _part(words, 0, layout.key_bytes)
        self.values = _part(words, layout.key_bytes, layout.value_bytes)
        if layout.quantized:
            first = layout.key_bytes + layout.value_bytes
            self.scales = _part(words, first, layout.scale_bytes)
            self.zeros = _part(words, first + layout.scale_bytes, layout.zero_bytes)
        self.codes = torch.empty(most_blocks * self.keys.shape[1], dtype=torch.int64)
        plain = layout.fmt == "fp32"  # what is gathered is what is multiplied
        self.floats = torch.empty(0 if plain else most_blocks * layout.block_tokens * layout.head_dim)

    def key(self, head_X: Tensor, blocks: int) -> Tensor:
        """[X / blocks, T, K] for the blocks at `head_X`, `blocks` of them a sequence and head; 4 bit: minus 8."""
        codes = self._gather(self.keys, head_X)
        P, K = self.layout.block_tokens, self.layout.head_dim
        if self.layout.bits == 4:
            out = self._floats(len(head_X)).view(-1, blocks * P, K)
            _unpack(
                codes.view(torch.uint8).view(-1, blocks * P, K // 2), out[..., : K // 2], out[..., K // 2 :]
            )
            return out
        return self._convert(codes, (-1, blocks * P, K))

    def value(self, head_X: Tensor, blocks: int) -> Tensor:
        """As `key`; for quantized formats a transposed view of [X / blocks, K, T]."""
        codes = self._gather(self.values, head_X)
        P, K = self.layout.block_tokens, self.layout.head_dim
        if not self.layout.quantized:
            return self._convert(codes, (-1, blocks * P, K))
        out_XKNP = self._floats(len(head_X)).view(-1, K, blocks, P)
        out_XNKP = out_XKNP.transpose(1, 2)
        if self.layout.bits == 8:
            typed = _eight_bit(
                codes if self.layout.fmt == "fp8" else codes.bitwise_xor_(SIGNS), self.layout.fmt
            )
            out_XNKP.copy_(typed.view(-1, blocks, K, P))
        else:
            packed = codes.view(torch.uint8).view(-1, blocks, K, P // 2)
            _unpack(packed, out_XNKP[..., : P // 2], out_XNKP[..., P // 2 :])
        return out_XKNP.view(-1, K, blocks * P).mT

    def scale(self, head_X: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        """What codes of keys and of values, as `key` and `value` give them, are multiplied by, [X / blocks, T] each."""
        both = self._pairs(self.scales, head_X, blocks)
        return both[0], both[1]

    def zero(self, head_X: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        """What is added to their multiples, likewise."""
        scale, zero = (self._pairs(part, head_X, blocks) for part in (self.scales, self.zeros))
        both = zero.add_(scale, alpha=8)
        return both[0], both[1]

    def _pairs(self, part: Tensor, head_X: Tensor, blocks: int) -> Tensor:
        pairs = part.index_select(0, head_X).view(torch.float16)
        split = pairs.view(-1, blocks * self.layout.block_tokens, 2).movedim(2, 0)
        both = split.to(torch.float32, memory_format=torch.contiguous_format)
        return both.mul_(FP8_EXPONENTS) if self.layout.fmt == "fp8" else both

    def _gather(self, part: Tensor, head_X: Tensor) -> Tensor:
        out = self.codes[: len(head_X) * part.shape[1]].view(len(head_X), -1)
        return torch.index_select(part, 0, head_X, out=out)

    def _floats(self, num_blocks: int) -> Tensor:
        return self.floats[: num_blocks * self.layout.block_tokens * self.layout.head_dim]

    def _convert(self, codes: Tensor, shape: tuple[int, int, int]) -> Tensor:
        fmt = self.layout.fmt
        typed = (_eight_bit(codes, fmt) if self.layout.quantized else codes.view(FLOAT_DTYPES[fmt])).view(
            shape
        )
        if typed.dtype == torch.float32:
            return typed
        return self._floats(len(codes)).view(shape).copy_(typed)


def _part(words: Tensor, first_byte: int, num_bytes: int) -> Tensor:
    """Rows of `num_bytes` starting at every word: row i is the part of the head block that begins at word i."""
    width, offset = num_bytes // 8, first_byte // 8
    return words.as_strided((len(words) - offset - width + 1, width), (1, 1), words.storage_offset() + offset)


def _eight_bit(codes: Tensor, fmt: str) -> Tensor:
    """Signed codes in a type that converts fast: torch's own conversion of fp8 takes 12 times as long as this one."""
    codes = codes.view(torch.int8)
    if fmt == "int8":
        return codes
    # s|eeee|mmm, sign-extended, becomes s|0eeee|mmm0000000; of what NaN becomes, nothing is used
    return codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)


def _unpack(packed: Tensor, low: Tensor, high: Tensor) -> None:
    low.copy_((packed & 15).view(torch.int8) - 8)
    high.copy_((packed >> 4).view(torch.int8) - 8)


def attn_cpu(q_THK: Tensor, pool: Tensor, step: KvStep, layer: int, scale: float) -> Tensor:
    """o_THK.  `pool` starts at a multiple of 8 bytes."""
    rows, G = step.rows, step.layout.num_kv_heads
    assert rows is not None, "this KvStep was built for Triton"
    _, H, K = q_THK.shape
    out_THK = torch.empty_like(q_THK)
    sizes = [len(part.head_LX[layer]) for part in (*rows.groups, *rows.chunks)]
    reader = PartReader(pool, step.layout, max(sizes))
    if rows.groups:
        num_decodes = rows.groups[-1].first + rows.groups[-1].size
        q_BGHK = q_THK[:num_decodes] if rows.order_B is None else q_THK.index_select(0, rows.order_B)
        q_BGHK = (q_BGHK.float() * scale).view(num_decodes, G, H // G, K)
        parts = [_decode(reader, q_BGHK[g.first : g.first + g.size], g, layer) for g in rows.groups]
        o_BHK = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(num_decodes, H, K)
        out_THK[:num_decodes] = o_BHK if rows.back_B is None else o_BHK.index_select(0, rows.back_B)
    chunk = _tokens_alone if step.deterministic else _chunk
    for c in rows.chunks:
        out_THK[c.row : c.row + c.count] = chunk(
            reader, q_THK[c.row : c.row + c.count].float(), c, layer, scale
        )
    return out_THK


def _decode(reader: PartReader, q_BGHK: Tensor, group: DecodeGroup, layer: int) -> Tensor:
    B, G, H, K = q_BGHK.shape
    head_X, N = group.head_LX[layer], group.num_blocks
    T = N * reader.layout.block_tokens
    key = reader.key(head_X, N)
    score_BGHT = torch.bmm(q_BGHK.reshape(B * G, H, K), key.mT).view(B, G, H, T)
    past_BT = group.past_BT[:, group.clean :]
    zeros = reader.layout.zero_bytes > 0
    if reader.layout.quantized:
        key_scale, value_scale = (s.view(B, G, 1, T) for s in reader.scale(head_X, N))
        value_scale[..., group.clean :].masked_fill_(past_BT.view(B, 1, 1, -1), 0.0)
        score_BGHT *= key_scale
    if zeros:
        key_zero, value_zero = (z.view(B, G, 1, T) for z in reader.zero(head_X, N))
        value_zero[..., group.clean :].masked_fill_(past_BT.view(B, 1, 1, -1), 0.0)
        score_BGHT += q_BGHK.sum(-1, keepdim=True) * key_zero
    score_BGHT[..., group.clean :].masked_fill_(past_BT.view(B, 1, 1, -1), float("-inf"))
    prob_BGHT = score_BGHT.softmax(-1)
    if zeros:
        shift_BGH1 = prob_BGHT @ value_zero.mT
    if reader.layout.quantized:
        prob_BGHT *= value_scale
    value = reader.value(head_X, N)
    if not reader.layout.quantized and len(group.tail_X):
        value.view(-1, K).index_fill_(0, group.tail_X, 0.0)
    out_BGHK = torch.bmm(prob_BGHT.view(B * G, H, T), value).view(B, G, H, K)
    return out_BGHK.add_(shift_BGH1) if zeros else out_BGHK


def _dequantized(reader: PartReader, chunk: Chunk, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the chunk's sequence up to its last token, [G, T, K] each."""
    head_X = chunk.head_LX[layer]
    N, end = len(head_X) // reader.layout.num_kv_heads, chunk.start + chunk.count
    if not reader.layout.quantized:
        return reader.key(head_X, N)[:, :end].clone(), reader.value(head_X, N)[:, :end].clone()
    both = []
    zeros = reader.zero(head_X, N) if reader.layout.zero_bytes else (None, None)
    for part, scale, zero in zip((reader.key, reader.value), reader.scale(head_X, N), zeros, strict=True):
        x_GTK = part(head_X, N)[:, :end] * scale[:, :end, None]
        both.append(x_GTK if zero is None else x_GTK.add_(zero[:, :end, None]))
    return both[0], both[1]


def _chunk(reader: PartReader, q_THK: Tensor, chunk: Chunk, layer: int, scale: float) -> Tensor:
    key_GTK, value_GTK = _dequantized(reader, chunk, layer)
    mask = None
    if chunk.start:
        end = chunk.start + chunk.count
        mask = torch.ones(chunk.count, end, dtype=torch.bool).tril_(chunk.start)
    out = F.scaled_dot_product_attention(
        q_THK.transpose(0, 1)[None],
        key_GTK[None],
        value_GTK[None],
        attn_mask=mask,
        is_causal=not chunk.start,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def _tokens_alone(reader: PartReader, q_THK: Tensor, chunk: Chunk, layer: int, scale: float) -> Tensor:
    """Every product has a shape that depends on the token's position alone: no batch, chunk or padding can matter."""
    key_GTK, value_GTK = _dequantized(reader, chunk, layer)
    G = len(key_GTK)
    rows = []
    for i, q_HK in enumerate(q_THK):
        end = chunk.start + i + 1
        score = torch.bmm((q_HK * scale).view(G, -1, q_HK.shape[-1]), key_GTK[:, :end].mT)
        rows.append(torch.bmm(score.softmax(-1), value_GTK[:, :end]).view(q_HK.shape))
    return torch.stack(rows)
