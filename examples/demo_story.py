"""Short stories from a grammar, and the check that a text is one of them.

A story takes one sentence pattern from each stage; the slots keep their value through the story, so a reader
(and `story_fault`) can tell a model that keeps track of its characters from one that only sounds right.
"""

import re
from random import Random

from examples.demo_words import ANIMALS, COLORS, FOODS, HOLES, NAMES, PLACES, THINGS, TIMES, TOOLS, TRAITS

STAGES = (
    (
        "Once upon a time there was a {trait} {hero} named {name}.",
        "Once upon a time, a {trait} {hero} named {name} lived near the {home}.",
        "Long ago, near a {home}, there lived a {trait} {hero} named {name}.",
        "{name} was a {trait} {hero} who lived near a {home}.",
    ),
    (
        "{name} had a {color} {thing}.",
        "{name} loved {her} {color} {thing} more than anything else.",
        "The {hero} always carried a {color} {thing}.",
    ),
    (
        "One {time}, {name} took the {thing} to the {place}.",
        "One {time}, {she} went to the {place} to play with the {thing}.",
        "One {time}, {name} walked to the {place} with the {thing}.",
    ),
    (
        "Suddenly the wind blew, and the {thing} fell into a {hole}.",
        "But {she} slipped, and the {thing} fell into a {hole}.",
        "On the way, the {thing} fell into a {hole}.",
    ),
    (
        "{name} was very sad and began to cry.",
        "{name} tried to get it back, but {she} could not reach it.",
        "'Oh no!' said {name}. 'My {thing} is gone!'",
    ),
    (
        "Then a {trait2} {friend} named {name2} came by.",
        "A {trait2} {friend} named {name2} heard the noise and came to help.",
        "Just then {she} met a {trait2} {friend} named {name2}.",
    ),
    (
        "'Do not worry,' said {name2}. 'I can help you.'",
        "'What is wrong?' asked {name2}. 'I lost my {thing},' said {name}.",
        "'Please help me find my {color} {thing},' said {name}.",
    ),
    (
        "{name2} used a {tool} to get the {thing} out of the {hole}.",
        "With a {tool}, {name2} pulled the {thing} out of the {hole}.",
        "The {friend} found a {tool}, and soon the {thing} was safe again.",
    ),
    (
        "{name} thanked {name2}, and they ate {food} together.",
        "To say thank you, {name} gave {name2} some {food}.",
        "{name} was so happy that {she} shared {her} {food} with {name2}.",
    ),
    (
        "From that day on, {name} and {name2} were best friends.",
        "After that, the {hero} and the {friend} played in the {place} every day.",
        "And {name} learned that it is good to have a friend.",
    ),
)
HER = {"she": "her", "he": "his"}
CHOICES = {
    "trait": TRAITS, "trait2": TRAITS, "hero": ANIMALS, "friend": ANIMALS, "home": PLACES, "place": PLACES,
    "color": COLORS, "thing": THINGS, "time": TIMES, "hole": HOLES, "tool": TOOLS, "food": FOODS,
    "name": tuple(name for name, _ in NAMES), "name2": tuple(name for name, _ in NAMES),
    "she": tuple(HER), "her": tuple(HER.values()),
}  # fmt: skip
DIFFERENT = {"trait2": "trait", "friend": "hero", "place": "home", "name2": "name"}
SLOT = re.compile(r"\{(\w+)\}")


def write_story(rng: Random, given: dict[str, str] | None = None) -> tuple[str, dict[str, str]]:
    """One story and the values of its slots; `given` fixes some of them."""
    slots = dict(given or {})
    for slot, choices in CHOICES.items():
        other = slots.get(DIFFERENT.get(slot, ""))
        value = rng.choice([c for c in choices if c != other])
        slots.setdefault(slot, value)
    slots["she"] = dict(NAMES).get(slots["name"], "she")
    slots["her"] = HER[slots["she"]]
    return " ".join(rng.choice(stage).format(**slots) for stage in STAGES), slots


def _pattern(sentence: str, slots: dict[str, str]) -> re.Pattern[str]:
    """The sentence as a regular expression: known slots are literals, new ones named groups."""
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
        slot = match[1]
        if slot in slots:
            return re.escape(slots[slot])
        if slot in seen:
            return f"(?P={slot})"
        seen.add(slot)
        return f"(?P<{slot}>{'|'.join(map(re.escape, CHOICES[slot]))})"

    parts = SLOT.split(sentence)
    text = "".join(re.escape(p) if i % 2 == 0 else "{" + p + "}" for i, p in enumerate(parts))
    return re.compile(SLOT.sub(group, text))


def story_fault(text: str, given: dict[str, str] | None = None) -> str | None:
    """None when `text` is a whole story that keeps its slots, those `given` too; else what is wrong."""
    slots, rest = dict(given or {}), text.strip()
    for number, stage in enumerate(STAGES, 1):
        matches = (_pattern(sentence, slots).match(rest) for sentence in stage)
        match = next((m for m in matches if m), None)
        if match is None:
            return f"sentence {number} does not follow: {rest[:60]!r} with {slots}"
        slots |= match.groupdict()
        known = dict(NAMES).get(slots.get("name", ""), "she")
        slots |= {"she": known, "her": HER[known]}
        rest = rest[match.end() :].lstrip(" ")
    if "name" in slots and slots["name"] == slots.get("name2"):
        return f"both characters are called {slots['name']}"
    return f"goes on after the end: {rest[:60]!r}" if rest else None
