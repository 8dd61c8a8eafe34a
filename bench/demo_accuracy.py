"""How often the demo model answers right, by kind of question, weight precision and KV format.

    python -m bench.demo_accuracy [--items 100] [--engine transformers]

Greedy answers to questions that training never saw (examples/demo_text.py splits by hash; small talk is a
closed list, learned by heart).  An answer counts when it equals the expected one; a story when it is whole
and keeps its characters, places and things.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from examples.demo_questions import KINDS, Item
from examples.demo_story import story_fault
from examples.demo_text import draw

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo"
MAX_NEW = 224
# weights and activations, keys and values; auto is what the device computes this checkpoint in
WEIGHTS = ("auto", "w8a8-int8", "w4a8-int8")
KV_FORMATS = ("auto", "int8", "int4")
Answer = Callable[[list[list[int]]], list[list[int]]]


def held_out(count: int, kinds: list[str], seed: int = 7) -> list[Item]:
    """`count` distinct questions of each kind, fewer where it has fewer; the same for every variant."""
    items: dict[str, Item] = {}
    for kind in kinds:
        rng, before = Random(f"{seed}:{kind}"), len(items)
        for _ in range(count * 20):
            item = draw(rng, kind, held_out=True)
            items.setdefault(item.question, item)
            if len(items) - before == count:
                break
    return list(items.values())


def is_right(item: Item, text: str) -> bool:
    if item.kind == "story":
        return story_fault(text, dict(item.given)) is None
    return text.strip() == item.answer


def score(items: list[Item], texts: list[str]) -> dict[str, float]:
    """Share of right answers by kind, and `all`: the mean over kinds."""
    marks: dict[str, list[bool]] = {}
    for item, text in zip(items, texts, strict=True):
        marks.setdefault(item.kind, []).append(is_right(item, text))
    shares = {kind: sum(rights) / len(rights) for kind, rights in marks.items()}
    return shares | {"all": sum(shares.values()) / len(shares)}


def prompts_of(tokenizer: Any, items: list[Item]) -> list[list[int]]:
    chats = [[{"role": "user", "content": item.question}] for item in items]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def transformers_answers(path: Path, batch: int) -> Answer:
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    end = model.generation_config.eos_token_id

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        out: dict[int, list[int]] = {}
        for at in range(0, len(order), batch):
            rows = order[at : at + batch]
            width = max(len(prompts[i]) for i in rows)
            ids = torch.tensor([[end] * (width - len(prompts[i])) + prompts[i] for i in rows])
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
            made = model.generate(
                ids, attention_mask=mask, max_new_tokens=MAX_NEW, do_sample=False, pad_token_id=end
            )
            out |= dict(zip(rows, made[:, width:].tolist(), strict=True))
        return [out[i] for i in range(len(prompts))]

    return answer


def minserve_answers(llm: Any) -> Answer:
    from minserve import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=MAX_NEW)
    return lambda prompts: [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params)]


def decode(tokenizer: Any, end: int, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True)
    return text


def measure(args: argparse.Namespace, items: list[Item]) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts, end = prompts_of(tokenizer, items), tokenizer.eos_token_id
    rows = []

    def run(weights: str, kv: str, answer: Answer) -> None:
        start = time.perf_counter()
        made = answer(prompts)
        seconds = time.perf_counter() - start
        texts = [decode(tokenizer, end, ids) for ids in made]
        rows.append(
            {
                "weights": weights,
                "kv": kv,
                "seconds": round(seconds, 1),
                "accuracy": score(items, texts),
                "tag": "measured",
            }
        )
        for item, text in zip(items, texts, strict=True):
            if args.wrong and not is_right(item, text):
                print(f"[{weights}, KV {kv}] {item.kind}: {item.question!r} -> {text!r}, not {item.answer!r}")

    if args.engine == "transformers":
        run("float32", "float32", transformers_answers(args.model, args.batch))
        return rows
    from minserve import LLM

    for quantization, kv in product(args.weights, args.kv):
        with LLM(str(args.model), quantization=quantization, kv_dtype=kv) as llm:
            names = (llm.dtype if name == "auto" else name for name in (quantization, kv))
            run(*names, minserve_answers(llm))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    names = [f"{row['weights']} / {row['kv']}" for row in rows]
    lines = ["| kind | " + " | ".join(names) + " |", "|---|" + "---:|" * len(rows)]
    for kind in rows[0]["accuracy"]:
        lines.append(f"| {kind} | " + " | ".join(f"{100 * row['accuracy'][kind]:.1f}" for row in rows) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--engine", choices=("minserve", "transformers"), default="minserve")
    parser.add_argument("--items", type=int, default=100, help="questions of each kind")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS)
    parser.add_argument("--kv", nargs="+", choices=KV_FORMATS, default=KV_FORMATS)
    parser.add_argument("--batch", type=int, default=64, help="rows in a transformers batch")
    parser.add_argument("--wrong", action="store_true", help="print every wrong answer")
    args = parser.parse_args()
    items = held_out(args.items, args.kinds)
    rows = measure(args, items)
    print(
        f"right answers in %, {len(items)} held-out questions, engine {args.engine}, columns: weights / KV\n"
    )
    print(table(rows) + "\n")
    print(
        json.dumps(
            {
                "bench": "demo_accuracy",
                "engine": args.engine,
                "items": len(items),
                "torch": torch.__version__,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
