"""What attention over the pool is to compute, for all the kernels that do it."""

import torch
from torch import Tensor

from kernels.kv_read import read_kv
from kernels.kv_step import KvStep


def attention_ref(
    q_THK: Tensor, pool: Tensor, step: KvStep, layer: int, scale: float, power: int = 1
) -> Tensor:
    """Sequence by sequence on the dequantized keys and values, in the type of q (fp64: the truth).  `power` of values."""
    lay, spans, out_THK = step.layout, step.spans, torch.empty_like(q_THK)
    for start, count, row, blocks_N in zip(
        spans.start_B, spans.count_B, spans.row_B, spans.block_BN, strict=True
    ):
        end = int(start + count)
        ids = blocks_N[: lay.blocks_for(end)].tolist()
        key_TGK, value_TGK = (x[:end].to(q_THK) for x in read_kv(pool, lay, step.slab_table_SL, ids, layer))
        q_HTK = q_THK[row : row + count].transpose(0, 1)
        heads = q_HTK.shape[0] // lay.num_kv_heads
        score_HTT = q_HTK @ key_TGK.permute(1, 2, 0).repeat_interleave(heads, 0) * scale
        past = torch.ones(int(count), end, dtype=torch.bool, device=q_THK.device).triu_(int(start) + 1)
        prob_HTT = score_HTT.masked_fill_(past, float("-inf")).softmax(-1)
        out_THK[row : row + count] = (
            prob_HTT @ value_TGK.pow(power).transpose(0, 1).repeat_interleave(heads, 0)
        ).transpose(0, 1)
    return out_THK
