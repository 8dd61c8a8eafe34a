"""Keys of cached blocks: equal for equal tokens under one root, different for everything else."""

import random

import pytest

from sched.prefix import KeyChain, keys_of, root_key

ROOT = root_key("model")


def test_equal_beginnings_have_equal_keys() -> None:
    one = keys_of(ROOT, range(64), 16)
    other = keys_of(ROOT, [*range(40), *range(100, 124)], 16)
    assert len(one) == len(other) == 4
    assert one[:2] == other[:2]
    assert not {*one[2:]} & {*other[2:]}


def test_equal_blocks_behind_different_ones_differ() -> None:
    one = keys_of(ROOT, [1, 1, 7, 8, 9, 9], 2)
    other = keys_of(ROOT, [2, 2, 7, 8, 9, 9], 2)
    assert not {*one} & {*other}
    assert len({*keys_of(ROOT, [3] * 40, 4)}) == 10, "and the same block again is another one"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 23], [12, 3]),
        ([1, 2], [2, 1]),
        ([0, 0], [0, 256]),
        ([1, 0], [256, 0]),
        ([255, 0], [255, 65536]),
        ([1, 1 << 24], [1, 1]),
        ([(1 << 32) - 1, 0], [(1 << 31) - 1, 0]),
        ([0, 1], [0, 1 << 16]),
    ],
)
def test_tokens_do_not_run_into_each_other(one: list[int], other: list[int]) -> None:
    assert keys_of(ROOT, one, 2) != keys_of(ROOT, other, 2)


def test_only_full_blocks_have_keys() -> None:
    assert [len(keys_of(ROOT, range(n), 4)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_a_chain_that_grows_token_by_token_is_the_same() -> None:
    rng = random.Random(1)
    for P in (1, 2, 16, 64):
        tokens = [rng.randrange(1 << 17) for _ in range(5 * P + 3)]
        chain, keys, at = KeyChain(ROOT, P), [], 0
        while at < len(tokens):
            n = rng.randint(0, 2 * P)
            keys += chain.extend(tokens[at : at + n])
            at += n
        assert tuple(keys) == keys_of(ROOT, tokens, P)
        assert chain.parent == keys[-1]


def test_parts_of_a_root_do_not_run_into_each_other() -> None:
    roots = [
        root_key("ab", "c"), root_key("a", "bc"), root_key("abc"), root_key("abc", ""), root_key("", "abc"),
        root_key(), root_key(""), root_key("\ud800"), root_key("\x00\x00"), root_key("c", "ab"),
    ]  # fmt: skip
    assert len({*roots}) == len(roots)
    for root in roots[1:]:
        assert not {*keys_of(roots[0], range(8), 4)} & {*keys_of(root, range(8), 4)}


def test_keys_are_the_same_in_every_process() -> None:
    """sha256 and no hash of Python's, which a process draws for itself."""
    assert keys_of(ROOT, range(4), 4)[0].hex().startswith("81d50f8457f083ca")


def test_a_token_outside_four_bytes_is_refused() -> None:
    for token in (-1, 1 << 32):
        with pytest.raises(OverflowError):
            keys_of(ROOT, [token], 1)
