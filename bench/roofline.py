"""The least time one step of a model can take, and where the engine stands.

    python -m bench.roofline --shape llama-3-8b --weights w4a8 --kv int4 --batch 64 --context 1024
    python -m bench.roofline path/to/model --batch 1 16 64 --gpu a100
    python -m bench.roofline --shape llama-3-8b --prefill 8192

Each part is bound by its bytes or its operations, whichever takes longer: the layers' weights, the context's keys and
values, the head (16 bit unless --head w8) with its logits.  Activations are taken to stay in L2, launches to cost
nothing.  Limits are arithmetic (tag simulated); where a GPU run left results, its steps (tag measured) stand beside.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from bench.shapes import CHIPS, MODELS, Model, Rates
from kernels.kv_layout import KvLayout
from kernels.spec import ModelShape

RESULTS = Path(__file__).resolve().parent / "results" / "gpu"
# bytes of a weight; 4-bit ones share two bytes of scale and zero among 128
WEIGHTS = {"bf16": 2.0, "w8a8": 1.0, "w4a8": 0.5 + 2 / 128}
HEADS = {"bf16": 2, "w8": 1}
KV = ("bf16", "fp8", "int8", "int4")


class Precision(NamedTuple):
    weights: str
    kv: str
    head: str = "bf16"


class Limit(NamedTuple):
    """Seconds of one step, by part."""

    linear_s: float
    attention_s: float
    head_s: float

    @property
    def total_s(self) -> float:
        return sum(self)


def kv_token_bytes(model: Model, kv: str) -> float:
    layout = KvLayout(kv, model.shape.G, model.shape.K)
    return model.layers * layout.block_bytes / layout.block_tokens


def rates_of(rates: Rates, weights: str) -> tuple[float, float]:
    """Operations a second of the layers' products, and of everything in 16 bit."""
    return (rates.f16 if weights == "bf16" else rates.low), rates.f16


def decode_limit(model: Model, p: Precision, batch: int, context: int, rates: Rates) -> Limit:
    """One token for each of `batch` sequences of `context` tokens."""
    s, (peak, f16), bandwidth = model.shape, rates_of(rates, p.weights), rates.bandwidth
    linear = max(model.linear_params * WEIGHTS[p.weights] / bandwidth, 2 * model.linear_params * batch / peak)
    head_peak = f16 if p.head == "bf16" else rates.low
    head = max(model.head_params * HEADS[p.head] / bandwidth, 2 * model.head_params * batch / head_peak)
    logits = 2 * batch * s.V * 2 / bandwidth  # written once, read once
    pairs = batch * context
    attention = max(
        pairs * kv_token_bytes(model, p.kv) / bandwidth, 4 * s.H * s.K * model.layers * pairs / f16
    )
    return Limit(linear, attention, head + logits)


def prefill_limit(model: Model, p: Precision, tokens: int, rates: Rates) -> Limit:
    """One fresh sequence; of the head, only the last row counts and is left out."""
    s, (peak, f16) = model.shape, rates_of(rates, p.weights)
    streamed = model.linear_params * WEIGHTS[p.weights] / rates.bandwidth
    attention = 2 * s.H * s.K * model.layers * tokens**2 / f16  # causal: half of all pairs
    return Limit(max(streamed, 2 * model.linear_params * tokens / peak), attention, 0.0)


def model_of(folder: Path) -> Model:
    """From a Llama folder's config.json."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; name a model's folder or --shape {', '.join(MODELS)}")
    c = json.loads(file.read_text())
    heads = c["num_attention_heads"]
    shape = ModelShape(
        D=c["hidden_size"],
        H=heads,
        G=c.get("num_key_value_heads", heads),
        K=c.get("head_dim") or c["hidden_size"] // heads,
        F=c["intermediate_size"],
        V=c["vocab_size"],
    )
    return Model(shape, c["num_hidden_layers"], c.get("tie_word_embeddings", False))


def measured(folder: Path) -> list[dict[str, Any]]:
    """What GPU runs left; empty where there was none."""
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def standing(rows: list[dict[str, Any]], name: str, row: dict[str, Any]) -> float | None:
    """Milliseconds of the same step, measured on the same kind of chip; the last run counts."""
    same = [
        r["ms"]
        for r in rows
        if r.get("bench") == "whole-model"
        and r["model"] == name
        and row["gpu"] in r["device"].lower()
        and all(r.get(k) == row[k] for k in ("phase", "kv", "batch", "context"))
        and r["weights"].split("-")[0] == row["weights"]
        and r["arm"] == "minserve"
    ]
    return same[-1] if same else None


def measured_rates(rows: list[dict[str, Any]], gpu: str) -> Rates | None:
    """The ceilings that the last run on this kind of chip reached."""
    found = [r for r in rows if r.get("bench") == "ceilings" and gpu in r["device"].lower()]
    return (
        Rates(found[-1]["copy"], found[-1]["bf16"], found[-1]["fp8"] or found[-1]["int8"]) if found else None
    )


def rows_of(args: argparse.Namespace, model: Model, name: str) -> list[dict[str, Any]]:
    chip, found = CHIPS[args.gpu], measured(args.results)
    p = Precision(args.weights, args.kv, args.head)
    steps = [("prefill", 1, n) for n in args.prefill] or [
        ("decode", batch, context) for batch in args.batch for context in args.context
    ]
    rows = []
    for phase, batch, context in steps:
        row: dict[str, Any] = {
            "phase": phase,
            "gpu": args.gpu,
            "weights": p.weights,
            "kv": p.kv,
            "batch": batch,
            "context": context,
            "tag": "simulated",
        }
        # a run's own ceilings, where there was one, are what "practical" stands for until then
        practical = measured_rates(found, args.gpu) or chip.practical
        for kind, rates in (("datasheet", chip.datasheet), ("practical", practical)):
            if phase == "prefill":
                limit, tokens = prefill_limit(model, p, context, rates), context
            else:
                limit, tokens = decode_limit(model, p, batch, context, rates), batch
            row[kind] = {
                "ms": round(limit.total_s * 1e3, 3),
                "tok_s": round(tokens / limit.total_s),
                "parts_ms": {k: round(v * 1e3, 3) for k, v in limit._asdict().items()},
            }
        row["engine_ms"] = standing(found, name, row)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'phase':<8}{'B':>5}{'context':>8}{'datasheet ms':>13}{'practical ms':>13}{'tok/s':>9}"
        f"{'linear':>9}{'attention':>10}{'head':>8}{'engine ms':>11}{'of limit':>9}"
    ]
    for r in rows:
        parts, engine = r["practical"]["parts_ms"], r["engine_ms"]
        stands = f"{engine:>11.3f}{r['practical']['ms'] / engine:>9.0%}" if engine else f"{'-':>11}{'-':>9}"
        lines.append(
            f"{r['phase']:<8}{r['batch']:>5}{r['context']:>8}{r['datasheet']['ms']:>13.2f}{r['practical']['ms']:>13.2f}"
            f"{r['practical']['tok_s']:>9}{parts['linear_s']:>9.2f}{parts['attention_s']:>10.2f}{parts['head_s']:>8.2f}{stands}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, help="a Llama folder")
    parser.add_argument("--shape", choices=MODELS, help="in place of a folder")
    parser.add_argument("--weights", default="bf16", choices=WEIGHTS)
    parser.add_argument("--kv", default="bf16", choices=KV)
    parser.add_argument("--head", default="bf16", choices=HEADS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[1024])
    parser.add_argument(
        "--prefill", type=int, nargs="+", default=[], help="prompt tokens, in place of decodes"
    )
    parser.add_argument("--gpu", default="h200", choices=CHIPS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of a GPU run's JSON lines")
    args = parser.parse_args()
    if (args.model is None) == (args.shape is None):
        parser.error("name a model's folder or a --shape")
    name = args.shape or args.model.name
    rows = rows_of(args, MODELS[name] if args.shape else model_of(args.model), name)
    print(f"{name}, weights {args.weights}, KV {args.kv}, head {args.head}, one {args.gpu}")
    print(table(rows))
    print(json.dumps({"bench": "roofline", "model": name, "rows": rows}))


if __name__ == "__main__":
    main()
