"""Paged attention: o = softmax(scale q k^T) v over the keys and values as stored, causal, for decodes and chunks.

T tokens of the step, H query heads in G groups that share a KV head, K head dim.  Every query sees its own key and all
before it, read back from the pool (so write first): chunk cuts and preemption change no input.
"""

import torch
from torch import Tensor

from kernels.attn_cpu import attn_cpu
from kernels.attn_decode import attn_decode
from kernels.attn_prefill import attn_prefill
from kernels.kv_read import read_kv
from kernels.kv_step import KvStep


def attention_ref(q_THK: Tensor, pool: Tensor, step: KvStep, layer: int, scale: float) -> Tensor:
    """Sequence by sequence on the dequantized keys and values, in the type of q (fp64: the truth)."""
    lay, spans, out_THK = step.layout, step.spans, torch.empty_like(q_THK)
    for start, count, row, blocks_N in zip(spans.start_B, spans.count_B, spans.row_B, spans.block_BN, strict=True):
        end = int(start + count)
        ids = blocks_N[: lay.blocks_for(end)].tolist()
        key_TGK, value_TGK = (x[:end].to(q_THK) for x in read_kv(pool, lay, step.slab_table_SL, ids, layer))
        q_HTK = q_THK[row : row + count].transpose(0, 1)
        heads = q_HTK.shape[0] // lay.num_kv_heads
        score_HTT = q_HTK @ key_TGK.permute(1, 2, 0).repeat_interleave(heads, 0) * scale
        past = torch.ones(int(count), end, dtype=torch.bool, device=q_THK.device).triu_(int(start) + 1)
        prob_HTT = score_HTT.masked_fill_(past, float("-inf")).softmax(-1)
        out_THK[row : row + count] = (prob_HTT @ value_TGK.transpose(0, 1).repeat_interleave(heads, 0)).transpose(0, 1)
    return out_THK


def attention_triton(q_THK: Tensor, pool: Tensor, step: KvStep, layer: int, scale: float) -> Tensor:
    out_THK = torch.empty_like(q_THK)
    if len(step.work.piece_X4):
        attn_decode(out_THK, q_THK, pool, step, layer, scale)
    if len(step.work.chunk_X4):
        attn_prefill(out_THK, q_THK, pool, step, layer, scale)
    return out_THK


def attention(q_THK: Tensor, pool: Tensor, step: KvStep, layer: int, scale: float) -> Tensor:
    """o_THK.  The step says whether it is deterministic, and which path it was built for."""
    lay = step.layout
    assert q_THK.is_contiguous(), f"{q_THK.stride()=}"
    assert len(q_THK) == step.num_tokens, f"{q_THK.shape=} {step.num_tokens=}"
    assert q_THK.shape[1] % lay.num_kv_heads == 0 and q_THK.shape[2] == lay.head_dim, f"{q_THK.shape=} {lay=}"
    run = attn_cpu if step.work is None else attention_triton
    return run(q_THK, pool, step, layer, scale)
