"""The demo: its text is reproducible and split cleanly, and the committed model answers from it."""

import hashlib
import json
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from bench.demo_accuracy import held_out, is_right, score
from examples.demo_questions import KINDS, Item
from examples.demo_story import story_fault, write_story
from examples.demo_text import NEVER_HELD_OUT, WEIGHTS, draw, draw_chat, draw_plain, is_held_out
from examples.train_demo import BEGIN, CHAT_TEMPLATE, END, Rows
from minserve.config import load_config

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo"
ASKED = (
    ("What is 17 + 25?", "17 + 25 = 42."),
    ("What is 52 - 17?", "52 - 17 = 35."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Mia has a red ball. Tom has a blue kite. Who has the kite?", "Tom has the kite."),
    ("Which is larger, 34 or 71?", "71 is larger than 34."),
    ("Count from 3 to 9.", "3 4 5 6 7 8 9."),
    ("Hello!", "Hello! How can I help you?"),
)


def texts(seed: int, count: int) -> list[str]:
    rng = Random(seed)
    return [json.dumps(draw_chat(rng)) for _ in range(count)] + [draw_plain(rng) for _ in range(count)]


def test_the_text_is_the_text_the_model_was_trained_on():
    assert texts(3, 200) == texts(3, 200)
    assert texts(3, 200) != texts(4, 200)
    # change this only together with the weights: the held-out items are held out of this text
    assert hashlib.sha256("\n".join(texts(3, 200)).encode()).hexdigest()[:16] == "23eca2e6bf2f66af"


@pytest.mark.parametrize("kind", KINDS)
def test_training_never_draws_a_held_out_item(kind):
    rng = Random(5)
    trained = {draw(rng, kind, held_out=False).key for _ in range(400)}
    tested = {item.key for item in held_out(40, [kind])}
    assert WEIGHTS[kind] > 0
    assert tested
    if kind not in NEVER_HELD_OUT:
        assert not trained & tested
        assert all(is_held_out(kind, key) for key in tested)
        assert not any(is_held_out(kind, key) for key in trained)


def test_sums_are_held_out_whatever_their_order_and_wording():
    rng = Random(6)
    items = [KINDS["sum"](rng) for _ in range(3000)]
    sides: dict[str, set[bool]] = {}
    for item in items:
        pair = "+".join(sorted(item.answer.split(" = ")[0].split(" + ")))
        sides.setdefault(pair, set()).add(is_held_out("sum", item.key))
    assert all(len(side) == 1 for side in sides.values())
    assert 0.05 < sum(True in side for side in sides.values()) / len(sides) < 0.15


def test_every_story_passes_its_own_check():
    rng = Random(7)
    for _ in range(100):
        item = draw(rng, "story", held_out=True)
        assert story_fault(item.answer, dict(item.given)) is None
        assert is_right(item, item.answer)


def test_a_story_that_forgets_is_a_fault():
    text, slots = write_story(Random(8), {"hero": "fox", "name": "Mia", "thing": "kite"})
    assert story_fault(text, slots) is None
    assert story_fault(text.replace("Mia", "Rosa"), slots) is not None
    assert story_fault(text.replace("kite", "drum", 1)) is not None
    assert story_fault(text[: len(text) // 2]) is not None
    assert story_fault(text + " And then?") is not None
    assert "both characters" in str(story_fault(text.replace(slots["name2"], "Mia")))


def test_score_counts_by_kind():
    items = [
        Item("sum", "1 + 1", "1 + 1 = 2.", "1+1"),
        Item("sum", "1 + 2", "1 + 2 = 3.", "1+2"),
        Item("count", "", "1 2 3.", ""),
    ]
    assert score(items, ["1 + 1 = 2.", "1 + 2 = 4.", " 1 2 3."]) == {"sum": 0.5, "count": 1.0, "all": 0.75}


def test_the_demo_folder_is_small():
    sizes = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    assert sum(sizes.values()) <= 4_000_000, sizes
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def test_the_tokenizer_takes_any_text(tokenizer):
    for text in ("17 + 25", "  two  spaces\n", "naïve façade", "日本語と🙂", "\x00\x7f"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == BEGIN
        assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.eos_token_id == END


def test_chats_are_written_as_they_were_trained(tokenizer):
    rows = Rows(tokenizer.backend_tokenizer, Random(0))
    ids, _ = next(row for row in iter(rows.document, None) if rows.roles["user"] in row[0])
    text = tokenizer.decode(ids)
    parts = [p.split("|>", 1) for p in text.removeprefix("<|begin|>").replace("<|end|>", "").split("<|")[1:]]
    messages = [{"role": role, "content": content} for role, content in parts]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_a_content_part_list_reads_as_its_text(tokenizer):
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    parts = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], tokenize=False
    )
    assert plain == parts == "<|begin|><|user|>Hi<|end|>"


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def complete(model, tokenizer, text: str, max_new: int) -> str:
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new, do_sample=False, pad_token_id=END
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def ask(model, tokenizer, question: str, max_new: int = 40, system: str | None = None) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return complete(model, tokenizer, text, max_new)


@pytest.mark.parametrize(("question", "answer"), ASKED)
def test_the_model_answers(model, tokenizer, question, answer):
    assert ask(model, tokenizer, question) == answer
    assert ask(model, tokenizer, question, system="You are a helpful assistant.") == answer


def test_the_model_tells_a_story_about_what_was_asked(model, tokenizer):
    # without a name it often calls both characters alike, which the accuracy bench counts as wrong
    text = ask(model, tokenizer, "Tell me a story about a fox named Mia.", max_new=224)
    assert story_fault(text, {"hero": "fox", "name": "Mia"}) is None


def test_the_model_goes_on_with_a_plain_text(model, tokenizer):
    start = "Once upon a time, a kind fox named Mia"
    text = start + complete(model, tokenizer, f"<|begin|>{start}", 224)
    assert story_fault(text, {"hero": "fox", "name": "Mia"}) is None


def test_the_model_declines_what_it_does_not_know(model, tokenizer):
    assert ask(model, tokenizer, "Explain the theory of relativity.").startswith("I am a tiny demo model")


def test_a_long_chat_does_not_derail_it(model, tokenizer):
    turns = [
        ("What is 17 + 25?", "17 + 25 = 42."),
        ("What is the opposite of hot?", "The opposite of hot is cold."),
    ] * 15
    messages = [
        m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})
    ]
    messages.append({"role": "user", "content": "What is the capital of Japan?"})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert len(tokenizer(text)["input_ids"]) > 600
    assert complete(model, tokenizer, text, 30) == "The capital of Japan is Tokyo."


def test_demo_yaml_serves_three_precisions():
    config = load_config(ROOT / "examples" / "demo.yaml")
    assert [m.name for m in config.models] == ["demo-fp16", "demo-w8a8", "demo-w4a8"]
    assert len({m.quantization for m in config.models}) == 3
    assert {Path(m.path).resolve() for m in config.models} == {DEMO}
