"""What a checkpoint brings for its KV cache, layer by layer: constant scales, and FireQ's factors of channels after RoPE.

Constant scales count where the KV format is the checkpoint's own (`kv_dtype: auto`); under an explicit one scales are made
at run time, a token and head each, and those of the file are read, reported and dropped.
"""

import torch

from kernels.kv_layout import CODE_BITS
from kernels.kv_write_triton import NO_SCALES, KvScales
from minserve.kv_use import KvUse
from minserve.model_config import LlamaConfig
from minserve.weights import WeightSource
from quant.formats import fireq, kv_cache

PLAIN = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KEPT = "in fp16 as the cache keeps them"


def layer_scales(source: WeightSource, attn: str, config: LlamaConfig, kv: KvUse) -> KvScales:
    """Of one layer, from the tensors beside its attention `attn`; ValueError names one that is missing or wrong."""
    # without a declared scheme scales are tensors that belong to nothing, and `finish` says so
    fields = source.fields(attn, kv_cache.SUFFIXES) if kv.declared else {}
    scales = NO_SCALES
    if kv.static:
        k_G, v_G = kv_cache.load(attn, fields, config.num_kv_heads, kv.fmt, PLAIN[source.dtype])
        if bool((k_G == k_G[0]).all() and (v_G == v_G[0]).all()):
            scales = KvScales(static=(float(k_G[0]), float(v_G[0])))
            source.report.remark(f"KV cache: constant {kv.fmt} scales of the checkpoint, one a layer, {KEPT}")
        else:
            source.report.remark("KV cache: the checkpoint's scales a head give way to ones made at run time")
    elif fields:
        source.report.remark(
            f"KV cache: {kv.fmt} with scales made at run time; those of the checkpoint are not used"
        )
    if dropped := [name for name in fields if name in kv_cache.DROPPED]:
        source.report.remark(f"not used: {', '.join(dropped)} ({kv_cache.WHY_DROPPED})")
    factors = source.fields(attn, fireq.POST_ROPE)
    if not factors:
        return scales
    try:
        channel_GK = fireq.load_post_rope(factors, config.num_heads, config.num_kv_heads, config.head_dim)
    except ValueError as error:
        raise ValueError(f"{attn}: {error}") from error
    if channel_GK is None or kv.fmt not in CODE_BITS:
        source.report.remark("FireQ's factors after RoPE are not used: nothing of the KV cache is quantized")
        return scales
    source.report.remark("KV cache: keys are divided by FireQ's factors after RoPE, queries multiplied")
    return scales._replace(channel_GK=channel_GK.float().contiguous().to(source.device))
