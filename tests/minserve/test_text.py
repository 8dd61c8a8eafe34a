"""Text: detokenizer, stop strings and chat templates against whole-string answers, however the tokens are grouped."""

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Inner

from minserve.text import WORD_MARK, ChatTemplate, IncrementalDetokenizer, StopStrings, Tokenizer, to_json
from tests.tiny import write_tokenizer

SAMPLES = [
    "plain words",
    "日本語のテキスト",
    "🙂🙃 family 👨‍👩‍👧",
    "naïve café — “quotes”",
    "a\u0301 \u200d \U0001f9ff",
    "\x00\t\n end",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tok"), 400))


@pytest.fixture(scope="module")
def fallback_tokenizer() -> Tokenizer:
    """Llama 2's kind: a word mark, byte tokens for what the vocabulary does not hold."""
    vocab = {
        "<s>": 0,
        "</s>": 1,
        **{f"<0x{b:02X}>": b + 2 for b in range(256)},
        WORD_MARK + "hi": 258,
        "there": 259,
    }
    vocab[WORD_MARK + "there"] = 260
    inner = Inner(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace(WORD_MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    return Tokenizer(inner, {"bos_token": "<s>", "eos_token": {"content": "</s>"}}, None)


def cuts(rng: random.Random, items: list[int]) -> list[list[int]]:
    at = sorted(rng.sample(range(len(items) + 1), k=min(3, len(items))))
    return [items[a:b] for a, b in zip([0, *at], [*at, len(items)], strict=True)]


def test_unknown_ids_are_not_remembered(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([10**9, -1, 2**40, 65]) == tokenizer.decode([65])
    assert not {10**9, -1, 2**40} & tokenizer._bytes.keys()


@pytest.mark.parametrize("text", SAMPLES)
def test_text_comes_back_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([i]) for i in ids]
    assert "".join(pieces) == text == tokenizer.decode(ids)
    assert not any("\ufffd" in p for p in pieces)


def test_grouping_does_not_change_the_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 40))]
        whole = IncrementalDetokenizer(tokenizer, skip_special_tokens=False).push(ids)
        parts = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
        assert "".join(parts.push(c) for c in cuts(rng, ids)) == whole
        # the library's own answer differs only in the incomplete character at the very end
        theirs = tokenizer._inner.decode(ids, skip_special_tokens=False)
        assert theirs in (whole, whole + "\ufffd")


def test_a_split_character_is_dropped_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 🙂", add_special_tokens=False)
    assert tokenizer.decode(ids[:-1]) == "ok "


def test_special_tokens_are_skipped_on_request(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("a", add_special_tokens=False), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|begin|>a<|end|>"


def test_byte_fallback_and_word_marks(fallback_tokenizer: Tokenizer) -> None:
    smile = [b + 2 for b in "🙂".encode()]
    ids = [0, 258, 260, *smile, 259]
    assert fallback_tokenizer.decode(ids) == "hi there🙂there" == fallback_tokenizer._inner.decode(ids)
    # an answer goes on after a prompt: there the word mark is a space
    assert IncrementalDetokenizer(fallback_tokenizer).push([258]) == " hi"


def test_unknown_ids_spell_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(10**6) == b"" == tokenizer.token_bytes(2**40)


def brute_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            best = max(found, key=len)
            return text[: end if include else end - len(best)], best
    return text, None


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_equal_brute_force_for_every_cut(include: bool) -> None:
    rng = random.Random(2)
    for _ in range(500):
        text = "".join(rng.choice("aab🙂") for _ in range(rng.randrange(1, 30)))
        stops = [
            "".join(rng.choice("aab🙂") for _ in range(rng.randrange(1, 5)))
            for _ in range(rng.randrange(1, 4))
        ]
        matcher, shown, at = StopStrings(stops, include), "", 0
        while at < len(text) and matcher.matched is None:
            size = rng.randrange(1, 5)
            shown += matcher.push(text[at : at + size])
            at += size
            want, _ = brute_stop(text, stops, include)
            assert want.startswith(shown), f"{text=} {stops=} showed {shown!r} past {want!r}"
        shown += matcher.finish()
        assert (shown, matcher.matched) == brute_stop(text, stops, include), f"{text=} {stops=}"


def test_held_text_is_shown_when_no_stop_comes() -> None:
    matcher = StopStrings(["END"])
    assert matcher.push("the EN") == "the "
    assert matcher.push("d") == "ENd"
    assert matcher.push("E") == ""
    assert matcher.finish() == "E"


MESSAGES = [{"role": "user", "content": "hi"}]


def test_chat_template_renders_like_a_file(tokenizer: Tokenizer) -> None:
    assert tokenizer.chat is not None
    assert tokenizer.chat.render(MESSAGES) == "user: hi\nassistant: "
    open_end = [*MESSAGES, {"role": "assistant", "content": "I am"}]
    text = tokenizer.chat.render(open_end, add_generation_prompt=False, continue_final_message=True)
    assert text == "user: hi\nassistant: I am"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[5].content.x }}", "no element 5"),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "more than"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}", "than"),
    ],
)
def test_hostile_templates_end_in_an_error(source: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minserve.text.RENDER_DEADLINE_S", 0.3)
    with pytest.raises(ValueError, match=says):
        ChatTemplate(source, "", "").render(MESSAGES)


def test_template_arguments_cannot_be_shadowed() -> None:
    with pytest.raises(ValueError, match="must not name"):
        ChatTemplate("x", "", "").render(MESSAGES, extra={"messages": []})
    with pytest.raises(ValueError, match="does not compile"):
        ChatTemplate("{% if %}", "", "")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", b"{}", "cannot be read"),
        ("tokenizer.json", b"\xff\xfe", "cannot be read"),
        ("tokenizer_config.json", b"[1]", "must hold a JSON object"),
        ("tokenizer_config.json", b"{" * 5000, "not valid JSON"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    write_tokenizer(tmp_path, 300)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        Tokenizer.load(tmp_path)
    assert name in str(caught.value)


def test_a_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_tojson_spells_as_transformers_does() -> None:
    assert to_json({"b": [1, "ü"], "a": None}) == '{"b": [1, "ü"], "a": null}'
    assert to_json({"b": 1, "a": 2}, indent=1, sort_keys=True) == '{\n "a": 2,\n "b": 1\n}'
