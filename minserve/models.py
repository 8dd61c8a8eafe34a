"""The Llama forward pass over the slab pool: token ids and a KvStep in, normed hidden rows or logits out.

Plain classes over the ops of `kernels`; no nn.Module, no state besides the weights.  Activations stay quantized
between an op that quantizes rows and the matmul that wants them, so W8A8 and W4A8 layers never see floats they did
not ask for.  Knows nothing of requests or files.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from kernels.attention import attention
from kernels.kv_layout import KvLayout
from kernels.kv_step import KvStep
from kernels.kv_write_triton import NO_SCALES, KvScales
from kernels.rmsnorm import rmsnorm
from kernels.rope_kv_write import rope_kv_write
from kernels.silu_mul import silu_mul
from minserve.kv_scales import layer_scales
from minserve.kv_use import KvUse
from minserve.linear import Linear
from minserve.model_config import LlamaConfig
from minserve.rope import RopeTables
from minserve.rows import rounded_in_fp8
from minserve.weights import WeightSource


@dataclass(frozen=True, slots=True)
class Block:
    """The weights of one decoder layer; q|k|v and gate|up are fused along the output axis."""

    attn_norm_D: Tensor
    qkv: Linear
    o: Linear
    mlp_norm_D: Tensor
    gate_up: Linear
    down: Linear
    kv: KvScales = NO_SCALES
    layout: KvLayout | None = None  # of its keys and values, where it is not that of the step


@dataclass(frozen=True, slots=True)
class Llama:
    """A loaded model.  `rope` reaches to the longest position ever asked for; `int8_qk` and `fp8_prefill`: see attention;
    `fp8_queries`: they see queries rounded to fp8."""

    config: LlamaConfig
    embed_VD: Tensor
    blocks: tuple[Block, ...]
    norm_D: Tensor
    head: Linear
    rope: RopeTables
    int8_qk: bool = False
    fp8_prefill: bool = False
    fp8_queries: bool = False

    def hidden(
        self, ids_T: Tensor, step: KvStep, pool: Tensor, *, deterministic: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Runs all layers; returns (x_TD, residual_TD), still to be added and normed: see `logits`.

        Writes the keys and values of the step's tokens into `pool` (uint8, the whole slab pool).
        """
        c, deterministic = self.config, step.deterministic
        x_TD = F.embedding(ids_T, self.embed_VD)
        residual_TD: Tensor | None = None
        scale = c.head_dim**-0.5
        own = {b.layout: step.with_layout(b.layout) for b in self.blocks if b.layout is not None}
        for layer, b in enumerate(self.blocks):
            h = rmsnorm(x_TD, b.attn_norm_D, c.rms_norm_eps, residual_TD, quant=b.qkv.wants)
            residual_TD = x_TD if h.residual_TD is None else h.residual_TD
            qkv_TX = b.qkv(h.y_TD, h.scale_T, deterministic=deterministic)
            cos_MK, sin_MK = self.rope.cos_MK, self.rope.sin_MK
            at = step if b.layout is None else own[b.layout]
            q_THK = rope_kv_write(qkv_TX, cos_MK, sin_MK, pool, at, layer, c.num_heads, b.kv)
            if self.fp8_queries:
                q_THK = rounded_in_fp8(q_THK)
            o = attention(q_THK, pool, at, layer, scale, b.o.wants, self.int8_qk, self.fp8_prefill)
            o_TX, o_scale_T = (o.flatten(1), None) if isinstance(o, Tensor) else o
            x_TD = b.o(o_TX, o_scale_T, deterministic=deterministic)
            h = rmsnorm(x_TD, b.mlp_norm_D, c.rms_norm_eps, residual_TD, quant=b.gate_up.wants)
            residual_TD = h.residual_TD
            gu_T2F = b.gate_up(h.y_TD, h.scale_T, deterministic=deterministic)
            a = silu_mul(gu_T2F, quant=b.down.wants)
            x_TD = b.down(a.y_TF, a.scale_T, deterministic=deterministic)
        assert residual_TD is not None, "a model without layers"
        return x_TD, residual_TD

    def logits(self, x_RD: Tensor, residual_RD: Tensor, *, deterministic: bool = False) -> Tensor:
        """fp32 logits [R, V] of rows picked from what `hidden` returned."""
        h = rmsnorm(x_RD, self.norm_D, self.config.rms_norm_eps, residual_RD, quant=self.head.wants)
        return self.head(h.y_TD, h.scale_T, deterministic=deterministic).float()


def build_llama(
    config: LlamaConfig,
    source: WeightSource,
    rope: RopeTables,
    kv_use: KvUse | None = None,
    layouts: tuple[KvLayout, ...] = (),
) -> Llama:
    """Takes every tensor of a Llama from `source`; whatever is left there, or missing, is an error naming it.

    `kv_use`: the KV format, and what the checkpoint says of it; None: floats, and nothing.  `layouts`: of every layer's
    keys and values, where they are not all that of the step.
    """
    c, kv_use = config, kv_use or KvUse("fp32")
    d, q, kv = c.hidden_size, c.q_size, c.kv_size
    embed_VD = source.tensor("model.embed_tokens.weight", (c.vocab_size, d))
    blocks = []
    for i in range(c.num_layers):
        p = f"model.layers.{i}"
        attn, mlp = f"{p}.self_attn", f"{p}.mlp"
        layout = layouts[i] if layouts else None
        kv_here = kv_use.of(layout.fmt) if layout else kv_use
        blocks.append(
            Block(
                attn_norm_D=source.tensor(f"{p}.input_layernorm.weight", (d,)),
                qkv=source.linear(
                    (f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj"),
                    d,
                    (q, kv, kv),
                    bias=c.attention_bias,
                ),
                o=source.linear((f"{attn}.o_proj",), q, (d,), bias=c.attention_bias),
                mlp_norm_D=source.tensor(f"{p}.post_attention_layernorm.weight", (d,)),
                gate_up=source.linear(
                    (f"{mlp}.gate_proj", f"{mlp}.up_proj"), d, (c.intermediate_size,) * 2, bias=c.mlp_bias
                ),
                down=source.linear((f"{mlp}.down_proj",), c.intermediate_size, (d,), bias=c.mlp_bias),
                kv=layer_scales(source, attn, c, kv_here),
                layout=layout,
            )
        )
    norm_D = source.tensor("model.norm.weight", (d,))
    head = source.head("lm_head", embed_VD, tied=c.tie_word_embeddings)
    source.finish()
    return Llama(c, embed_VD, tuple(blocks), norm_D, head, rope)
