"""The bytes of a block, written by hand and read back, and the geometry that the pool is planned with."""

import re

import pytest
import torch

from kernels.kv_layout import DEFAULT_BLOCK_TOKENS, KV_FORMATS, KvLayout
from kernels.kv_read import read_kv, read_stored

TABLE = torch.tensor([[0, 8192], [4096, 12288]])  # two sets of two layers


@pytest.mark.parametrize("fmt", KV_FORMATS)
@pytest.mark.parametrize("head_dim", [2, 10, 64, 80, 128])
def test_every_part_is_aligned(fmt: str, head_dim: int):
    layout = KvLayout(fmt, 3, head_dim)
    assert layout.block_tokens == DEFAULT_BLOCK_TOKENS[fmt]
    for part in (
        layout.key_bytes,
        layout.value_bytes,
        layout.scale_bytes,
        layout.zero_bytes,
        layout.head_bytes,
    ):
        assert part % 16 == 0, f"{part=}"
    assert layout.block_bytes == 3 * layout.head_bytes


@pytest.mark.parametrize(
    ("fmt", "tokens", "bytes_"),
    [
        ("bf16", 64, 262144),
        ("fp32", 16, 131072),
        ("fp8", 32, 66560),
        ("int8", 32, 66560),
        ("int4", 32, 33792),
        ("int4z", 32, 34816),
    ],
)
def test_block_bytes_of_an_8b_model(fmt: str, tokens: int, bytes_: int):
    assert KvLayout(fmt, 8, 128, tokens).block_bytes == bytes_


def test_blocks_for_rounds_up():
    layout = KvLayout("bf16", 1, 64)
    assert [layout.blocks_for(n) for n in (0, 1, 31, 32, 33)] == [0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("int2", 1, 64), ["'int2'", "bf16", "int4"]),
        (("bf16", 0, 64), ["num_kv_heads=0"]),
        (("bf16", 1, 63), ["head_dim=63", "even"]),
        (("bf16", 1, 64, 24), ["block_tokens=24", "power of two"]),
        (("bf16", 1, 64, 8), ["block_tokens=8", "16"]),
        (("bf16", 1, 64, 512), ["block_tokens=512", "256"]),
        (("int4", 1, 64, 16), ["block_tokens=16", "32"]),
        (("int4z", 1, 64, 16), ["block_tokens=16", "32"]),
    ],
)
def test_wrong_geometry_is_named(args: tuple, words: list[str]):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        KvLayout(*args)
    for word in words:
        assert word in str(error.value)


def test_float_blocks_are_row_major():
    layout, pool = KvLayout("bf16", 2, 8), torch.zeros(16384, dtype=torch.uint8)
    at = 4096 + 1 * layout.block_bytes + 1 * layout.head_bytes  # set 1, layer 0, slot 1, head 1
    pool.view(torch.bfloat16)[at // 2 + 5 * 8 + 3] = 1.5  # key of token 5, dim 3
    pool.view(torch.bfloat16)[(at + layout.key_bytes) // 2 + 6 * 8 + 2] = -2.0  # value of token 6, dim 2
    key, value = read_kv(pool, layout, TABLE, [1 << 12 | 1], 0)
    assert key.shape == value.shape == (32, 2, 8)
    assert (key.nonzero().tolist(), key[5, 1, 3]) == ([[5, 1, 3]], 1.5)
    assert (value.nonzero().tolist(), value[6, 1, 2]) == ([[6, 1, 2]], -2.0)


def test_int8_values_are_transposed_and_biased_and_scales_are_pairs():
    layout, pool = KvLayout("int8", 1, 16), torch.zeros(16384, dtype=torch.uint8)
    at = 8192 + 2 * layout.block_bytes  # set 0, layer 1, slot 2
    pool.view(torch.int8)[at + 7 * 16 + 3] = -100  # key of token 7, dim 3
    pool[at + layout.key_bytes :][: layout.value_bytes] = 128  # codes 0
    pool[at + layout.key_bytes + 3 * 32 + 9] = 128 + 50  # value of token 9, dim 3
    scales = pool[at + layout.key_bytes + layout.value_bytes :].view(torch.float16)
    scales[2 * 7], scales[2 * 9 + 1] = 0.5, 0.25
    key, value = read_kv(pool, layout, TABLE, [2], 1)
    assert (key.nonzero().tolist(), key[7, 0, 3]) == ([[7, 0, 3]], -50.0)
    assert (value.nonzero().tolist(), value[9, 0, 3]) == ([[9, 0, 3]], 12.5)


def test_int4_nibbles():
    layout, pool = KvLayout("int4", 1, 8, 32), torch.full((16384,), 0x88, dtype=torch.uint8)  # all codes 0
    pool[3 * 4 + 1] = 0x1F  # key of token 3: dim 1 has code 15 - 8, dim 5 has 1 - 8
    pool[layout.key_bytes + 6 * 16 + 2] = 0x9A  # value, dim 6: token 2 has code 10 - 8, token 18 has 9 - 8
    stored = read_stored(pool, layout, TABLE, [0], 0)
    assert stored.key_XGK.nonzero().tolist() == [[3, 0, 1], [3, 0, 5]]
    assert stored.key_XGK[3, 0, [1, 5]].tolist() == [7, -7]
    assert stored.value_XGK.nonzero().tolist() == [[2, 0, 6], [18, 0, 6]]
    assert stored.value_XGK[[2, 18], 0, 6].tolist() == [2, 1]


def test_fp8_values_are_transposed():
    layout, pool = KvLayout("fp8", 1, 16), torch.zeros(16384, dtype=torch.uint8)
    codes = pool.view(torch.float8_e4m3fn)
    codes[7 * 16 + 3] = -448.0  # key of token 7, dim 3
    codes[layout.key_bytes + 3 * 32 + 9] = 1.5  # value of token 9, dim 3
    scales = pool[layout.key_bytes + layout.value_bytes :].view(torch.float16)
    scales[2 * 7], scales[2 * 9 + 1] = 0.5, 0.25
    key, value = read_kv(pool, layout, TABLE, [0], 0)
    assert (key.nonzero().tolist(), key[7, 0, 3]) == ([[7, 0, 3]], -224.0)
    assert (value.nonzero().tolist(), value[9, 0, 3]) == ([[9, 0, 3]], 0.375)


def test_zeros_come_after_scales():
    layout, pool = KvLayout("int4z", 1, 8, 32), torch.zeros(16384, dtype=torch.uint8)
    pool[3 * 4 + 1] = 0x1F  # key of token 3: dim 1 has code 15, dim 5 has 1
    pool[layout.key_bytes + 6 * 16 + 2] = 0x9A  # value, dim 6: token 2 has code 10, token 18 has 9
    scales = pool[layout.key_bytes + layout.value_bytes :].view(torch.float16)
    scales[2 * 3], scales[2 * 2 + 1], scales[2 * 18 + 1] = 0.5, 0.25, 2.0
    zeros = pool[layout.key_bytes + layout.value_bytes + layout.scale_bytes :].view(torch.float16)
    zeros[2 * 3], zeros[2 * 18 + 1] = -1.0, -3.0
    key, value = read_kv(pool, layout, TABLE, [0], 0)
    assert key[3, 0].tolist() == [-1.0, 6.5, -1.0, -1.0, -1.0, -0.5, -1.0, -1.0]
    assert not key[4:].any()
    assert value[2, 0].tolist() == [0, 0, 0, 0, 0, 0, 2.5, 0]
    assert value[18, 0].tolist() == [-3, -3, -3, -3, -3, -3, 15, -3]
