"""Every kernel the tests and the bench know; a new op is one new file and one line here."""

from kernels import (
    attention,
    attn_prefill,
    copy_blocks,
    gemm_fp8_block,
    gemm_w4a8,
    gemm_w8a8,
    kv_dequant,
    kv_to_fp8,
    linear,
    quant_blocks,
    quant_rows,
    rmsnorm,
    rope_kv_write,
    sample,
    silu_mul,
    w4_to_w8,
)
from kernels.spec import KernelSpec

SPECS: tuple[KernelSpec, ...] = (
    rmsnorm.SPEC,
    silu_mul.SPEC,
    quant_rows.SPEC,
    linear.SPEC,
    gemm_w8a8.SPEC,
    gemm_w4a8.SPEC,
    w4_to_w8.SPEC,
    quant_blocks.SPEC,
    gemm_fp8_block.SPEC,
    rope_kv_write.SPEC,
    kv_dequant.SPEC,
    kv_to_fp8.SPEC,
    copy_blocks.SPEC,
    attn_prefill.SPEC,
    attention.SPEC,
    sample.SPEC,
)
