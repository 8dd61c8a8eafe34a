"""What a precision costs: perplexity, KL divergence to the reference and agreement of the most likely token.

    python -m bench.quality MODEL --text test.txt                                # quantized at load, each scheme x KV
    python -m bench.quality MODEL OUT1 OUT2 --text test.txt --kv auto int4       # and checkpoints made from it
    python -m bench.quality MODEL --weights none w4a8-int8 --kv auto int8 --tokens 8000 --json quality.json

The first model, as it is stored and with KV as it computes, is the reference.  Windows slide over the text: the first
is scored whole, each further one over its last --stride tokens, the rest being context.  Logits come from the engine.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.variants import is_quantized
from minserve import LLM
from quant.ptq.model import read_shape

PLAIN = "none"
SCHEMES = ("w8a8-int8", "w8a8-fp8", "w4a8-int8", "w4a8-fp8")
KV = ("auto", "fp8", "int8", "int4z", "int4")
# reference logits that are held rather than computed again for every variant
HELD_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Window:
    """Token ids; the last `scored` of them are predicted from those before."""

    ids: list[int]
    scored: int


def windows(ids: list[int], width: int, stride: int) -> list[Window]:
    """Every token but the first is scored once.  ValueError where the text is too short to score one."""
    if not 1 <= stride < width:
        raise ValueError(f"stride must be at least 1 and less than the window of {width}, got {stride}")
    if len(ids) < 2:
        raise ValueError(f"the text must have at least 2 tokens, got {len(ids)}")
    made, done = [], 1
    while done < len(ids):
        end = min(len(ids), width if done == 1 else done + stride)
        made.append(Window(ids[max(0, end - width) : end], end - done))
        done = end
    return made


@dataclass(slots=True)
class Score:
    """Sums over scored tokens, in nats."""

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    same: int = 0

    def add(self, logp_SV: Tensor, reference_SV: Tensor, target_S: Tensor) -> None:
        """Log-probabilities of the scored tokens, and those of the reference."""
        self.tokens += len(target_S)
        self.nll -= float(logp_SV.gather(1, target_S[:, None]).double().sum())
        self.kl += float(F.kl_div(logp_SV, reference_SV, reduction="sum", log_target=True).double())
        self.same += int((logp_SV.argmax(1) == reference_SV.argmax(1)).sum())

    def figures(self) -> dict[str, float]:
        n = self.tokens
        return {"perplexity": math.exp(self.nll / n), "kl": self.kl / n, "top1": self.same / n}


def log_probs(llm: LLM, window: Window) -> Tensor:
    """float32 [scored, V] of the window's scored tokens."""
    logits_TV = llm.logits(window.ids[:-1])[-window.scored :]
    return logits_TV.log_softmax(-1)


def measure(llm: LLM, texts: list[Window], reference: Iterator[Tensor]) -> Score:
    score = Score()
    for window, wanted_SV in zip(texts, reference, strict=True):
        score.add(log_probs(llm, window), wanted_SV, torch.tensor(window.ids[-window.scored :]))
    return score


class Reference:
    """The first model's log-probabilities, window by window; held in memory where they are not too large."""

    def __init__(self, llm: LLM, texts: list[Window], vocab: int) -> None:
        self.llm, self.texts = llm, texts
        size = sum(w.scored for w in texts) * vocab * 4
        self.held = [log_probs(llm, w) for w in texts] if size <= HELD_BYTES else None

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.held or (log_probs(self.llm, w) for w in self.texts)


@dataclass(frozen=True, slots=True)
class Variant:
    model: Path
    weights: str  # as quantization has it
    kv: str


def variants(args: argparse.Namespace) -> list[Variant]:
    """Every model times its schemes times the KV formats; a quantized checkpoint has its own scheme alone."""
    found = []
    for model in args.models:
        weights = ["auto"] if is_quantized(model) else args.weights
        found += [Variant(model, w, kv) for w, kv in product(weights, args.kv)]
    return found


def open_llm(variant: Variant, args: argparse.Namespace) -> LLM:
    return LLM(
        variant.model,
        dtype=args.dtype,
        device=args.device,
        quantization=variant.weights,
        kv_dtype=variant.kv,
        max_model_len=args.window,
        pool_bytes=args.pool_bytes,
    )


def read_ids(args: argparse.Namespace) -> list[int]:
    """The text's tokens, by the first model's tokenizer, BOS included where that adds one."""
    from transformers import AutoTokenizer  # seconds to import: not for --help

    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text must be a UTF-8 text file, and {args.text} is none: {error}") from error
    if not text.strip():
        raise ValueError(f"--text must hold text, and {args.text} is empty")
    ids: list[int] = AutoTokenizer.from_pretrained(args.models[0])(text, verbose=False)["input_ids"]
    return ids[: args.tokens]


def rows_of(args: argparse.Namespace, texts: list[Window]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with open_llm(Variant(args.models[0], "auto", "auto"), args) as first:
        vocab = first.logits(texts[0].ids[:1]).shape[1]
        reference = Reference(first, texts, vocab)
        base = measure(first, texts, iter(reference)).figures()["perplexity"]
        for variant in variants(args):
            start = time.perf_counter()
            with open_llm(variant, args) as llm:
                score = measure(llm, texts, iter(reference))
                names = {
                    "model": variant.model.name,
                    "weights": variant.weights,
                    "kv": llm.dtype if variant.kv == "auto" else variant.kv,
                }
            found = score.figures()
            row = {
                **names,
                "tokens": score.tokens,
                **found,
                "above": found["perplexity"] / base - 1,
                "seconds": round(time.perf_counter() - start, 1),
                "tag": "measured",
            }
            rows.append(row)
            print(line(row), flush=True)
    return rows


HEAD = f"{'model':<28} {'weights':<10} {'kv':<6} {'perplexity':>10} {'above':>8} {'KL':>9} {'top-1':>7}"


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['model'][:28]:<28} {row['weights']:<10} {row['kv']:<6} {row['perplexity']:>10.4f} "
        f"{row['above']:>8.2%} {row['kl']:>9.2e} {row['top1']:>7.2%}"
    )


def check(args: argparse.Namespace) -> None:
    """ValueError for what would fail, or be lost, after minutes of work."""
    if args.tokens < 2:
        raise ValueError(f"--tokens must be at least 2, got {args.tokens}")
    if not 1 <= args.stride < args.window:
        raise ValueError(
            f"--stride must be at least 1 and less than --window {args.window}, got {args.stride}"
        )
    for model in args.models:
        if args.window > (most := read_shape(model).positions):
            raise ValueError(f"--window must be at most {most}, the positions of {model}, got {args.window}")
    if args.json is not None:
        folder = args.json.absolute().parent
        if args.json.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"--json must name a file in a folder that can be written to, got {args.json}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True, help="a text file, UTF-8")
    parser.add_argument("--tokens", type=int, default=20_000, help="of the text, from its start")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--weights", nargs="+", choices=(PLAIN, *SCHEMES), default=[PLAIN, *SCHEMES])
    parser.add_argument("--kv", nargs="+", choices=KV, default=list(KV))
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pool-bytes", type=int, default=64 << 20)
    parser.add_argument("--json", type=Path, help="also write the result there")
    args = parser.parse_args()
    for path in [*args.models, args.text]:
        if not path.exists():
            parser.error(f"{path} does not exist")
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parsed()
    try:
        texts = windows(read_ids(args), args.window, args.stride)
        print(HEAD)
        rows = rows_of(args, texts)
    except ValueError as error:
        sys.stderr.write(f"python -m bench.quality: {error}\n")
        raise SystemExit(2) from error
    result = {
        "bench": "quality",
        "device": platform.machine() if args.device in ("auto", "cpu") and not torch.cuda.is_available() else args.device,
        "torch": torch.__version__,
        "text": args.text.name,
        "window": args.window,
        "stride": args.stride,
        "dtype": args.dtype,
        "rows": rows,
    }  # fmt: skip
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
