"""Tokens per second of minserve against transformers' `generate`: same weights, prompts and process, interleaved.

    python -m bench.offline                      # a random 150M bf16 Llama, batch 1 and 32
    python -m bench.offline --model DIR --batch 8 --prompt 256 --new 64

Decode is what the tokens after the first cost: (B * (new - 1)) / (time of `new` tokens - time of one token), medians
of both times.  Prefill is the prompt tokens over the time of one token.  Every arm runs in turn, `--repeats` times;
the spread is that of single turns, the last line is one JSON object.  All arms decode the same number of tokens, none
caches a prefix.  A CPU without bf16 instructions runs transformers' bf16 far below its fp32, so there both are
baselines (`x best HF` is against the faster one), and ours runs in both types too.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from minserve import LLM, SamplingParams

SHAPE_150M = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds for a batch: prompt and one token, prompt and all tokens."""

    first_s: float
    all_s: float


@dataclass(frozen=True, slots=True)
class Load:
    batch: int
    prompt: int
    new: int


Arm = Callable[[torch.Tensor, int], float]


def write_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE_150M, bos_token_id=0, eos_token_id=1)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def hf_arm(path: Path, device: str, dtype: torch.dtype) -> Arm:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()

    @torch.inference_mode()
    def run(ids_BT: torch.Tensor, new: int) -> float:
        begin = time.perf_counter()
        out = model.generate(
            ids_BT.to(device),
            attention_mask=torch.ones_like(ids_BT, device=device),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        took = time.perf_counter() - begin
        assert out.shape[1] == ids_BT.shape[1] + new, f"transformers stopped early: {out.shape}"
        return took

    return run


def hf_continuous_arm(path: Path, device: str) -> Arm:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device).eval()

    def run(ids_BT: torch.Tensor, new: int) -> float:
        config = transformers.GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        begin = time.perf_counter()
        out = model.generate_batch(inputs=ids_BT.tolist(), generation_config=config, progress_bar=False)
        took = time.perf_counter() - begin
        made = [len(o.generated_tokens) for o in out.values()]
        assert made == [new] * len(ids_BT), f"transformers' continuous batching made {made} tokens"
        return took

    return run


def our_arm(path: Path, device: str, **keys: Any) -> Arm:
    # each prompt comes twice, and the others compute it twice
    llm = LLM(
        path, device=device, max_model_len=2048, pool_bytes=512 << 20, enable_prefix_caching=False, **keys
    )

    def run(ids_BT: torch.Tensor, new: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        prompts = ids_BT.tolist()
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - begin
        assert all(len(o.outputs[0].token_ids) == new for o in outputs), "minserve stopped early"
        return took

    return run


def measure(arms: dict[str, Arm], load: Load, vocab: int, repeats: int) -> dict[str, list[Timing]]:
    """Runs the arms in turn, so that a slow stretch of the machine hits all of them."""
    g = torch.Generator().manual_seed(load.batch)
    times: dict[str, list[Timing]] = {name: [] for name in arms}
    for turn in range(repeats + 1):
        ids_BT = torch.randint(2, vocab, (load.batch, load.prompt), generator=g)
        for name, arm in arms.items():
            timing = Timing(arm(ids_BT, 1), arm(ids_BT, load.new))
            if turn:  # the first turn warms up
                times[name].append(timing)
    return times


def rates(timings: list[Timing], load: Load) -> dict[str, float]:
    decode = [load.batch * (load.new - 1) / (t.all_s - t.first_s) for t in timings]
    first_s = statistics.median(t.first_s for t in timings)
    all_s = statistics.median(t.all_s for t in timings)
    return {
        "decode_tok_s": round(load.batch * (load.new - 1) / (all_s - first_s), 1),
        "decode_min": round(min(decode), 1),
        "decode_max": round(max(decode), 1),
        "prefill_tok_s": round(load.batch * load.prompt / first_s, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'batch':>5}  {'arm':<28}{'decode tok/s':>13}{'min..max':>16}{'x HF bf16':>11}{'x best HF':>11}{'prefill tok/s':>15}"
    lines = [head]
    for r in rows:
        lines.append(
            f"{r['batch']:>5}  {r['arm']:<28}{r['decode_tok_s']:>13.1f}{r['decode_min']:>8.1f}..{r['decode_max']:<6.1f}"
            f"{r['x_hf_bf16']:>11.2f}{r['x_best_hf']:>11.2f}{r['prefill_tok_s']:>15.1f}"
        )
    return "\n".join(lines)


def machine(device: str) -> dict[str, Any]:
    name = (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else platform.processor() or platform.machine()
    )
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def make_arms(path: Path, device: str, *, continuous: bool) -> dict[str, Arm]:
    arms = {"transformers bf16": hf_arm(path, device, torch.bfloat16)}
    if device == "cpu":
        arms["transformers fp32"] = hf_arm(path, device, torch.float32)
        arms["minserve fp32"] = our_arm(path, device, dtype="fp32")
    if continuous:
        arms["transformers continuous bf16"] = hf_continuous_arm(path, device)
    for quantization in ("none", "w8a8-int8"):
        for kv_dtype in ("auto", "int8"):
            weights, kv = (
                "bf16" if quantization == "none" else "w8a8-int8",
                "" if kv_dtype == "auto" else " kv-int8",
            )
            arms[f"minserve {weights}{kv}"] = our_arm(
                path, device, dtype="bf16", quantization=quantization, kv_dtype=kv_dtype
            )
    return arms


def compare(measured: dict[str, dict[str, float]], batch: int) -> list[dict[str, Any]]:
    """Rows with the decode speed against transformers in bf16, and against its fastest arm."""
    hf = {name: r["decode_tok_s"] for name, r in measured.items() if name.startswith("transformers")}
    base, best = hf["transformers bf16"], max(hf.values())
    return [
        {
            "batch": batch,
            "arm": name,
            **r,
            "x_hf_bf16": round(r["decode_tok_s"] / base, 3),
            "x_best_hf": round(r["decode_tok_s"] / best, 3),
            "tag": "measured",
        }
        for name, r in measured.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a Llama folder; default: a random 150M one")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--prompt", type=int, help="prompt tokens; default 512, on a CPU 16")
    parser.add_argument("--new", type=int, help="generated tokens; default 128, on a CPU 24")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--continuous", action="store_true", help="transformers' continuous batching too (slow on a CPU)"
    )
    args = parser.parse_args()
    cpu = args.device == "cpu"
    args.prompt, args.new = args.prompt or (16 if cpu else 512), args.new or (24 if cpu else 128)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        path = args.model or write_model(Path(scratch))
        vocab = transformers.AutoConfig.from_pretrained(path).vocab_size
        arms = make_arms(path, args.device, continuous=args.continuous)
        rows = []
        for batch in args.batch:
            load = Load(batch, args.prompt, args.new)
            rows += compare(
                {name: rates(t, load) for name, t in measure(arms, load, vocab, args.repeats).items()}, batch
            )
    print(table(rows))
    print(
        json.dumps(
            {"bench": "offline", "prompt": args.prompt, "new": args.new, **machine(args.device), "rows": rows}
        )
    )


if __name__ == "__main__":
    main()
