"""Frequencies of every rope_type against transformers' own, at lengths on both sides of the trained one."""

import pytest
import torch
from transformers import LlamaConfig as HfConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minserve.model_config import ROPE_TYPES, LlamaConfig
from minserve.rope import ROWS_AT_ONCE, check_positions, frequencies, rope_tables

LONG = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)]}
CASES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64, "rope_theta": 10000.0},
    "llama3-own-length": {"rope_type": "llama3", "factor": 32, "low_freq_factor": 1.0, "high_freq_factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-no-truncate": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 8, "beta_slow": 2,
                         "original_max_position_embeddings": 100},
    "yarn-mscale": {"rope_type": "yarn", "factor": 8.0, "mscale": 1.2, "mscale_all_dim": 0.7,
                    "original_max_position_embeddings": 32},
    "yarn-attention": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.3,
                       "original_max_position_embeddings": 32},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 64, **LONG},
    "longrope-factor": {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 8.0, **LONG},
    "longrope-attention": {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 8.0,
                           "attention_factor": 0.9, **LONG},
    "proportional": {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
BASE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1,
        "intermediate_size": 32, "vocab_size": 300, "max_position_embeddings": 128}  # fmt: skip


def both(rope: dict) -> tuple[LlamaConfig, HfConfig]:
    hf = HfConfig(**BASE, rope_parameters=dict(rope))
    raw = hf.to_dict()
    raw["rope_parameters"] = dict(rope)  # as the file says it, before transformers fills in defaults
    raw["architectures"] = ["LlamaForCausalLM"]
    return LlamaConfig.from_dict(raw), hf


@pytest.mark.parametrize("length", [16, 64, 65, 128, 129, 500])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_equal_transformers_at_that_length(case: str, length: int) -> None:
    ours, hf = both(CASES[case])
    kind = CASES[case]["rope_type"]
    init = (
        LlamaRotaryEmbedding.compute_default_rope_parameters
        if kind == "default"
        else ROPE_INIT_FUNCTIONS[kind]
    )
    want, want_factor = init(hf, device=torch.device("cpu"), seq_len=length)
    got = frequencies(ours, length)
    torch.testing.assert_close(got.inv_freq, want, rtol=1e-6, atol=0)
    assert got.attention_factor == pytest.approx(want_factor, rel=1e-12)


@pytest.mark.parametrize("length", [50, 200])
@pytest.mark.parametrize("case", CASES)
def test_tables_equal_what_transformers_rotates_with(case: str, length: int) -> None:
    ours, hf = both(CASES[case])
    cos, sin = LlamaRotaryEmbedding(hf)(torch.zeros(1), torch.arange(length)[None])
    tables = rope_tables(ours, length)
    torch.testing.assert_close(tables.cos_MK, cos[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(tables.sin_MK, sin[0], rtol=0, atol=2e-5)
    assert tables.cos_MK.dtype == torch.float32


def test_every_type_is_covered_and_types_differ() -> None:
    assert {c["rope_type"] for c in CASES.values()} == set(ROPE_TYPES)
    assert set(ROPE_TYPES) >= set(ROPE_INIT_FUNCTIONS), "transformers has a rope_type that we lack"
    default = frequencies(both({"rope_type": "default"})[0], 128).inv_freq
    for case, rope in CASES.items():
        if case not in ("default", "dynamic"):
            assert not torch.allclose(frequencies(both(rope)[0], 128).inv_freq, default), case


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_follow_max_model_len_and_not_the_requests(kind: str) -> None:
    config, _ = both(CASES[kind])
    short, long = rope_tables(config, 64), rope_tables(config, 512)
    assert not torch.allclose(short.cos_MK, long.cos_MK[:64])
    assert torch.equal(long.cos_MK, rope_tables(config, 512).cos_MK)


def test_tables_are_made_in_pieces_without_a_seam() -> None:
    config, _ = both(CASES["yarn-attention"])
    length = ROWS_AT_ONCE + 3
    inv_freq, factor = frequencies(config, length)
    angles = torch.cat((torch.arange(length)[:, None] * inv_freq,) * 2, dim=-1)
    cos_MK, sin_MK = rope_tables(config, length)
    assert torch.equal(cos_MK, angles.cos() * factor)
    assert torch.equal(sin_MK, angles.sin() * factor)


def test_positions_that_take_more_than_there_is_are_refused() -> None:
    config, _ = both(CASES["default"])
    check_positions(config, 1000, num_rows=8, room=1000 * 4 * (2 * 16 + 8))
    with pytest.raises(
        ValueError, match=r"max_model_len must be at most 1000 here, got 1001: a position takes 160 bytes"
    ):
        check_positions(config, 1001, num_rows=8, room=1000 * 4 * (2 * 16 + 8))
