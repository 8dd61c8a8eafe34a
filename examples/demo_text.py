"""The demo model's text: chats and plain stories, drawn from a seeded generator, some questions kept apart.

A hash of an item's key puts one question in ten aside for bench/demo_accuracy.py: training never sees it.
WEIGHTS says how often training meets each kind.
"""

import hashlib
from random import Random

from examples.demo_questions import KINDS, Item, odd_word
from examples.demo_story import write_story
from examples.demo_words import NAMES, SYSTEMS

HELD_OUT_PARTS = 10
Message = dict[str, str]
WEIGHTS = {
    "sum": 20,
    "difference": 17,
    "product": 5,
    "too large": 3,
    "larger": 7,
    "count": 7,
    "sort": 9,
    "reverse": 6,
    "capital": 6,
    "opposite": 4,
    "calendar": 4,
    "fact": 28,
    "story": 8,
    "small talk": 3,
    "off topic": 4,
}
NEVER_HELD_OUT = ("small talk",)  # a closed list: there is nothing to generalize to


def is_held_out(kind: str, key: str) -> bool:
    return int.from_bytes(hashlib.sha256(f"{kind}:{key}".encode()).digest()[:4]) % HELD_OUT_PARTS == 0


def draw(rng: Random, kind: str, held_out: bool) -> Item:
    """One item of the kind, from the held-out part or from the training part."""
    while True:
        item = KINDS[kind](rng)
        if kind in NEVER_HELD_OUT or is_held_out(kind, item.key) == held_out:
            return item


def ask_memory(rng: Random) -> list[Message]:
    """Two turns: what was told in the first is asked for in the second."""
    name = odd_word(rng).capitalize() if rng.random() < 0.3 else rng.choice(NAMES)[0]
    told = rng.choice(
        (f"My name is {name}.", f"I am {name}.", f"Hello, my name is {name}.", f"Hi, I am {name}.")
    )
    asked = rng.choice(("What is my name?", "Do you remember my name?", "Who am I?"))
    turns = ((told, f"Nice to meet you, {name}!"), (asked, f"Your name is {name}."))
    return [
        m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})
    ]


def hurried(rng: Random, question: str) -> str:
    """The question as people type it: now and then without its capital or its last mark."""
    if rng.random() < 0.1:
        question = question[0].lower() + question[1:]
    return question.rstrip(".?!") if rng.random() < 0.1 else question


def draw_chat(rng: Random) -> list[Message]:
    """A training chat: one to four turns, sometimes under a system prompt."""
    messages: list[Message] = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    if rng.random() < 0.04:
        messages += ask_memory(rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        item = draw(rng, rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0], held_out=False)
        messages += [
            {"role": "user", "content": hurried(rng, item.question)},
            {"role": "assistant", "content": item.answer},
        ]
    return messages


def draw_plain(rng: Random) -> str:
    """A training text without roles: a story, or a few true lines of arithmetic."""
    if rng.random() < 0.8:
        return write_story(rng)[0]
    return "\n".join(
        draw(rng, rng.choice(("sum", "difference", "product")), held_out=False).answer
        for _ in range(rng.randint(2, 8))
    )
