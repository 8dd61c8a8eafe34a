"""Patterns over names mean what `re.match` makes of them, and none takes long."""

import random
import re
import time

import pytest

from quant.formats.name_patterns import MAX_LENGTH, Budget, NamePattern

PARTS = (
    "a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", r"\.", "(", "(?:", ")", "|", "*", "+", "?", "{2}", "{1,2}", "{,2}",
    "{1,}", "^", "$", r"\b", r"\B", "(?=", "(?!", "*?", "1", "]", "}", "{", "[]a]", "[^]b]", r"[\]a]", r"\Z", r"\A",
)  # fmt: skip
NAMES = ("", "a", "ab", "a.b", "1a2", "ba11b", "aab.b1]", "{a}")
REAL = (
    ("model.layers.0.self_attn.q_proj", r".*self_attn\.(q|k|v|o)_proj$", True),
    ("model.layers.0.mlp.up_proj", r".*self_attn\.(q|k|v|o)_proj$", False),
    ("model.layers.12.mlp.up_proj", r"model\.layers\.(?:[0-9]|1[0-3])\.mlp.*", True),
    ("model.layers.14.mlp.up_proj", r"model\.layers\.(?:[0-9]|1[0-3])\.mlp.*", False),
    ("model.layers.14.mlp.up_proj", r"model.layers.\d+.mlp.(gate|up)_proj", True),
    ("model.layers.14.mlp.up_proj", r"^(?!.*lm_head).*$", True),
    ("lm_head", r"^(?!.*lm_head).*$", False),
    ("model.layers.7.mlp.up_proj", "mlp", False),
    ("model.layers.7.mlp.up_proj", r"model\.layers\.[\d]{1,2}\.", True),
)


@pytest.mark.parametrize(("name", "pattern", "wanted"), REAL)
def test_patterns_of_real_checkpoints(name: str, pattern: str, wanted: bool) -> None:
    assert NamePattern(pattern, Budget()).matches(name) is wanted
    assert bool(re.match(pattern, name)) is wanted


def test_random_patterns_mean_what_re_makes_of_them() -> None:
    r = random.Random(1)
    compared = 0
    for _ in range(20_000):
        text = "".join(r.choice(PARTS) for _ in range(r.randrange(1, 9)))
        try:
            theirs = re.compile(text)
        except re.error:
            continue
        # a possessive repetition is none here
        if re.search(r"[*+?}]\+", text):
            continue
        ours = NamePattern(text, Budget())
        for name in NAMES:
            assert ours.matches(name) == bool(theirs.match(name)), (text, name)
            compared += 1
    assert compared > 30_000


NAME = "nodel.layers.0.self_attn.q_proj" * 2 + "?"
SLOW = (
    "(?:.|.)*!", "(?:.?){31}" + "." * 64, ".*" * 8 + "!", "(.|..)*!", "(a+)+$", r"(m|mo|o|d|od|.)*!", ".+?" * 9 + "!",
    "(a|b)" * 150, "(?=(.|..)*!)" * 16, "(.?){500}!", "(?:.{0,9}){60}!",
)  # fmt: skip


@pytest.mark.parametrize("text", SLOW, ids=lambda t: t[:20])
def test_no_pattern_takes_long(text: str) -> None:
    start = time.process_time()
    assert not NamePattern(text, Budget()).matches(NAME)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("text", ["(?:a{1000}){1000}", "((){1000}){1000}", "(?:(?:.?){999}){999}"])
def test_patterns_that_are_too_large_are_refused_soon(text: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match="takes too long"):
        NamePattern(text, Budget())
    assert time.process_time() - start < 5


def test_the_work_of_all_patterns_is_bounded() -> None:
    budget = Budget(1000)
    patterns = [NamePattern(f"(.|..)*{i}", budget) for i in range(20)]
    with pytest.raises(ValueError, match="takes too long"):
        any(p.matches("model.layers.x") for p in patterns)
    with pytest.raises(ValueError, match=f"1001 characters are more than {MAX_LENGTH}"):
        NamePattern("a" * 1001, Budget())


@pytest.mark.parametrize(
    "text",
    [
        "(",
        "a)",
        "[a",
        "*",
        "a**",
        "a{3,2}",
        r"\1",
        "(?i)a",
        "(?<=a)b",
        "(" * 40,
        "a" + "\\",
        "[b-a]",
        "a{1,2}{3}",
    ],
)
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not understood"):
        NamePattern(text, Budget())
