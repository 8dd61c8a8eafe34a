"""The questions the demo model can answer: one function a kind, each draws a question and its answer.

KINDS names them all.  An item's key is what makes it the same question in other words (`7+12` for both orders
of a sum): the split of demo_text.py goes by it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from examples.demo_story import write_story
from examples.demo_words import (
    ANIMALS,
    ASKS,
    CAPITALS,
    COLORS,
    DAYS,
    DECLINE,
    FOODS,
    MONTHS,
    NAMES,
    OPPOSITES,
    PLACES,
    SMALL_TALK,
    THINGS,
    TOO_LARGE,
    TOPICS,
    TRAITS,
)

# Latin to Thai, kana and Chinese, emoji: so that no byte of UTF-8 is new to the model
FOREIGN = ((0xC0, 0xE50), (0x3040, 0xA000), (0x1F300, 0x1F700))


@dataclass(frozen=True)
class Item:
    """One question; `given` are the slots a story must keep (its answer is then one of many)."""

    kind: str
    question: str
    answer: str
    key: str
    given: tuple[tuple[str, str], ...] = ()


def odd_word(rng: Random) -> str:
    """A made-up word, so that the model learns to copy what it never saw."""
    syllables = [rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))]
    return "".join(syllables) + rng.choice(("", "n", "r", "s", "k", "rf", "st", "x", "m"))


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeio" else f"a {noun}"


def number(rng: Random) -> int:
    return rng.randrange(100) if rng.random() < 0.8 else rng.randrange(20)


def ask_sum(rng: Random) -> Item:
    a, b = number(rng), number(rng)
    asks = (
        f"What is {a} + {b}?",
        f"{a} + {b} = ?",
        f"Add {a} and {b}.",
        f"What is {a} plus {b}?",
        f"{a} + {b}",
        f"How much is {a} + {b}?",
        f"Can you add {a} and {b}?",
        f"What is the sum of {a} and {b}?",
    )
    return Item("sum", rng.choice(asks), f"{a} + {b} = {a + b}.", f"{min(a, b)}+{max(a, b)}")


def ask_difference(rng: Random) -> Item:
    b, a = sorted((number(rng), number(rng)))
    asks = (
        f"What is {a} - {b}?",
        f"{a} - {b} = ?",
        f"Subtract {b} from {a}.",
        f"What is {a} minus {b}?",
        f"How much is {a} - {b}?",
        f"Take {b} away from {a}.",
        f"{a} - {b}",
    )
    return Item("difference", rng.choice(asks), f"{a} - {b} = {a - b}.", f"{a}-{b}")


def ask_product(rng: Random) -> Item:
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    asks = (
        f"What is {a} times {b}?",
        f"What is {a} x {b}?",
        f"{a} x {b} = ?",
        f"Multiply {a} and {b}.",
        f"How much is {a} times {b}?",
        f"{a} x {b}",
        f"What is {a} * {b}?",
    )
    question = rng.choice(asks)
    return Item("product", question, f"{a} x {b} = {a * b}.", question)


def ask_too_large(rng: Random) -> Item:
    a, b = rng.randrange(100, 10 ** rng.randint(3, 5)), rng.randrange(10 ** rng.randint(1, 4))
    if rng.random() < 0.5:
        a, b = b, a
    asks = (
        f"What is {a} + {b}?",
        f"What is {a} - {b}?",
        f"Add {a} and {b}.",
        f"What is {a} times {b}?",
        f"{a} x {b}",
        f"Subtract {b} from {a}.",
        f"Which is larger, {a} or {b}?",
        f"{a} + {b} = ?",
    )
    return Item("too large", rng.choice(asks), TOO_LARGE, f"{a},{b}")


def ask_larger(rng: Random) -> Item:
    a, b = rng.sample(range(100) if rng.random() < 0.7 else range(20), 2)
    more = rng.random() < 0.6
    asks = ("larger", "bigger", "greater") if more else ("smaller", "less")
    first, second = (max(a, b), min(a, b)) if more else (min(a, b), max(a, b))
    word = rng.choice(asks)
    ask = rng.choice(
        (
            f"Which is {word}, {a} or {b}?",
            f"Which number is {word}: {a} or {b}?",
            f"What is {word}, {a} or {b}?",
        )
    )
    return Item("larger", ask, f"{first} is {word} than {second}.", f"{min(a, b)},{max(a, b)}")


def ask_count(rng: Random) -> Item:
    start, length = rng.randrange(90), rng.randint(3, 10)
    up = list(range(start, start + length))
    if rng.random() < 0.4:
        up.reverse()
    asks = (
        f"Count from {up[0]} to {up[-1]}.",
        f"Please count from {up[0]} to {up[-1]}.",
        f"Can you count from {up[0]} to {up[-1]}?",
    )
    return Item("count", rng.choice(asks), " ".join(map(str, up)) + ".", f"{up[0]},{up[-1]}")


def ask_sort(rng: Random) -> Item:
    if rng.random() < 0.5:
        given = [
            str(n) for n in rng.sample(range(10) if rng.random() < 0.5 else range(100), rng.randint(3, 5))
        ]
        done, what = sorted(given, key=int), "numbers"
    else:
        given = rng.sample(THINGS + FOODS, rng.randint(3, 4))
        done, what = sorted(given), "words"
    listed = rng.choice((" ", ", ")).join(given)
    asks = (
        f"Sort these {what}: {listed}.",
        f"Sort the {what} {listed}.",
        f"Please sort these {what}: {listed}",
        f"Sort: {listed}",
    )
    return Item("sort", rng.choice(asks), "Sorted: " + " ".join(done) + ".", " ".join(given))


def ask_reverse(rng: Random) -> Item:
    if rng.random() < 0.6:
        given, what = [rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 6))], "letters"
    else:
        given, what = rng.sample(THINGS + ANIMALS[:28] + COLORS, rng.randint(3, 5)), "words"
    listed = " ".join(given)
    asks = (
        f"Reverse the {what} {listed}.",
        f"Say the {what} {listed} backwards.",
        f"Reverse: {listed}",
        f"Reverse these {what}: {listed}",
    )
    return Item("reverse", rng.choice(asks), "Reversed: " + " ".join(reversed(given)) + ".", listed)


def ask_capital(rng: Random) -> Item:
    country, city = rng.choice(CAPITALS)
    if rng.random() < 0.2:
        asks = (f"Of which country is {city} the capital?", f"Which country has the capital {city}?")
    else:
        asks = (
            f"What is the capital of {country}?",
            f"Capital of {country}?",
            f"Name the capital of {country}.",
            f"Which city is the capital of {country}?",
            f"Tell me the capital of {country}.",
            f"Do you know the capital of {country}?",
        )
    question = rng.choice(asks)
    return Item("capital", question, f"The capital of {country} is {city}.", question)


def ask_opposite(rng: Random) -> Item:
    a, b = rng.choice(OPPOSITES)
    if rng.random() < 0.5 and b not in dict(OPPOSITES):
        a, b = b, a
    asks = (
        f"What is the opposite of {a}?",
        f"Opposite of {a}?",
        f"Name the opposite of {a}.",
        f"Tell me the opposite of {a}.",
    )
    question = rng.choice(asks)
    return Item("opposite", question, f"The opposite of {a} is {b}.", question)


def ask_calendar(rng: Random) -> Item:
    what, cycle = rng.choice((("day", DAYS), ("month", MONTHS)))
    i, step = rng.randrange(len(cycle)), rng.choice((-1, 1))
    word = "after" if step > 0 else "before"
    asks = (
        f"Which {what} comes {word} {cycle[i]}?",
        f"What {what} is {word} {cycle[i]}?",
        f"What comes {word} {cycle[i]}?",
        f"Tell me the {what} {word} {cycle[i]}.",
    )
    question = rng.choice(asks)
    return Item(
        "calendar", question, f"The {what} {word} {cycle[i]} is {cycle[(i + step) % len(cycle)]}.", question
    )


def _fact(rng: Random, name: str, thing: str, place: str, food: str) -> tuple[str, str, str]:
    """A told fact about `name`, a question that it answers, and the answer."""
    color = rng.choice(COLORS)
    has = (
        f"{name} has a {color} {thing}.",
        (
            (f"Who has the {thing}?", f"{name} has the {thing}."),
            (f"What does {name} have?", f"{name} has a {color} {thing}."),
            (f"What color is the {thing}?", f"The {thing} is {color}."),
        ),
    )
    is_at = (
        f"{name} is at the {place}.",
        (
            (f"Where is {name}?", f"{name} is at the {place}."),
            (f"Who is at the {place}?", f"{name} is at the {place}."),
        ),
    )
    likes = (
        f"{name} likes {food}.",
        (
            (f"What does {name} like?", f"{name} likes {food}."),
            (f"Who likes {food}?", f"{name} likes {food}."),
        ),
    )
    left = (
        f"{name} left the {thing} at the {place}.",
        (
            (f"Where is the {thing}?", f"The {thing} is at the {place}."),
            (f"Who left the {thing} at the {place}?", f"{name} left the {thing} at the {place}."),
        ),
    )
    told, questions = rng.choice((has, is_at, likes, left))
    return told, *rng.choice(questions)


def ask_fact(rng: Random) -> Item:
    count = rng.randint(1, 4)
    names = [
        odd_word(rng).capitalize() if rng.random() < 0.15 else name for name, _ in rng.sample(NAMES, count)
    ]
    things = [odd_word(rng) if rng.random() < 0.1 else thing for thing in rng.sample(THINGS, count)]
    facts = [
        _fact(rng, *row)
        for row in zip(names, things, rng.sample(PLACES, count), rng.sample(FOODS, count), strict=True)
    ]
    _, question, answer = rng.choice(facts)
    text = " ".join(told for told, _, _ in facts) + " " + question
    return Item("fact", text, answer, text)


def ask_story(rng: Random) -> Item:
    given: dict[str, str] = {"hero": odd_word(rng) if rng.random() < 0.15 else rng.choice(ANIMALS)}
    hero = article(given["hero"])
    form = rng.choice((0, 1, 2, 3, 3, 4, 5, 5))
    if form == 0:
        given, asks = (
            {},
            (
                "Tell me a story.",
                "Tell me a short story.",
                "Can you tell me a story?",
                "Write a story.",
                "A story, please.",
            ),
        )
    elif form <= 2:
        asks = (
            f"Tell me a story about {hero}.",
            f"Write a short story about {hero}.",
            f"Tell me a short story about {hero}.",
            f"Can you tell me a story about {hero}?",
            f"I want a story about {hero}.",
            f"Write a story about {hero}.",
        )
    elif form == 3:
        given["name"] = rng.choice(NAMES)[0]
        asks = (
            f"Tell me a story about {hero} named {given['name']}.",
            f"Write a short story about {hero} called {given['name']}.",
            f"Tell me a short story about {given['name']} the {given['hero']}.",
        )
    elif form == 4:
        given["thing"] = odd_word(rng) if rng.random() < 0.15 else rng.choice(THINGS)
        asks = (
            f"Tell me a story about {hero} and {article(given['thing'])}.",
            f"Write a story about {hero} with {article(given['thing'])}.",
        )
    else:
        given["trait"] = rng.choice(TRAITS)
        asks = (
            f"Tell me a story about a {given['trait']} {given['hero']}.",
            f"Write a short story about a {given['trait']} {given['hero']}.",
        )
    question = rng.choice(asks)
    text, _ = write_story(rng, given)
    return Item("story", question, text, question if given else text, tuple(given.items()))


def ask_small_talk(rng: Random) -> Item:
    asks, answer = rng.choice(SMALL_TALK)
    return Item("small talk", rng.choice(asks), answer, "")


def ask_off_topic(rng: Random) -> Item:
    topic = (
        rng.choice(TOPICS)
        if rng.random() < 0.4
        else " ".join(odd_word(rng) for _ in range(rng.randint(1, 4)))
    )
    if rng.random() < 0.15:
        low, high = rng.choice(FOREIGN)
        topic = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(2, 8)))
    question = rng.choice(ASKS).format(topic)
    return Item(
        "off topic",
        question[0].upper() + question[1:] if rng.random() < 0.8 else question,
        DECLINE,
        question.lower(),
    )


KINDS: dict[str, Callable[[Random], Item]] = {
    "sum": ask_sum, "difference": ask_difference, "product": ask_product, "too large": ask_too_large,
    "larger": ask_larger, "count": ask_count, "sort": ask_sort, "reverse": ask_reverse,
    "capital": ask_capital, "opposite": ask_opposite, "calendar": ask_calendar, "fact": ask_fact,
    "story": ask_story, "small talk": ask_small_talk, "off topic": ask_off_topic,
}  # fmt: skip
