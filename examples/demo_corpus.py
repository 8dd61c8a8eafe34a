"""Writes text as the demo models were trained on, fresh by seed: to calibrate on one file and to judge on another.

    python -m examples.demo_corpus --seed 11 --documents 1500 --out calib.txt
    python -m examples.demo_corpus --seed 13 --documents 250 --plain 1 --out test.txt

Chats carry the template's special tokens, which the models' tokenizer reads back as such.  Judge on plain documents
alone: training weighed what a user says with 0, so the models cannot predict it.
"""

import argparse
from pathlib import Path
from random import Random

from examples.demo_text import draw_chat, draw_plain


def document(rng: Random, plain: float) -> str:
    """One chat or, with the probability `plain`, one plain text, with its begin and end tokens."""
    if rng.random() < plain:
        return f"<|begin|>{draw_plain(rng)}<|end|>"
    turns = (f"<|{m['role']}|>{m['content']}<|end|>" for m in draw_chat(rng))
    return "<|begin|>" + "".join(turns)


def corpus(seed: int, documents: int, plain: float) -> str:
    rng = Random(f"corpus:{seed}")
    return "".join(document(rng, plain) for _ in range(documents))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--plain", type=float, default=0.2, help="share of documents without roles, 0 to 1")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(corpus(args.seed, args.documents, args.plain))


if __name__ == "__main__":
    main()
