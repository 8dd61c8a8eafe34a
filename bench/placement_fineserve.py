"""FineServe's slab-aware placement of seven models on four GPUs of 80 GB, from the authors' own table of costs.

    python -m bench.placement --fineserve fineserve-h100-apex-cost.csv

The models, rates and formats are those of a run of their code; what it chose (degree, batch, GPUs) is `AS_THEIRS`, so
a placement that differs is one that our rule would have made otherwise.
"""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sched.placement_fineserve import Llm, Row, slab_aware

SLO_SCALE = 50.0
# model and format of the table: billions, bits of weights, activations and KV, layers, width of a head, rate, base degree.
# Qwen's head is taken for 5120 / 64 = 80 there; it has 128
MODELS: dict[str, tuple[float, tuple[int, int, int], int, int, float, int]] = {
    "llama-3.1-70b/awq": (70, (4, 16, 16), 80, 128, 1, 1),
    "llama-3.1-8b/org": (8, (16, 16, 16), 32, 128, 4, 1),
    "llama-3.1-8b/fp8_kv8": (8, (8, 8, 8), 32, 128, 4, 1),
    "llama-3.1-8b/awq": (8, (4, 16, 16), 32, 128, 4, 1),
    "llama-3-8b/qoq": (8, (4, 8, 4), 32, 128, 2, 1),
    "qwen-3-32b/org": (32, (16, 16, 16), 64, 80, 2, 2),
    "qwen-3-32b/fp8_kv8": (32, (8, 8, 8), 64, 80, 2, 2),
}
EVERY = (0, 1, 2, 3)
# degree, batch, GPUs
AS_THEIRS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "qwen-3-32b/org": (4, 24, EVERY),
    "llama-3.1-70b/awq": (4, 14, EVERY),
    "qwen-3-32b/fp8_kv8": (4, 29, EVERY),
    "llama-3.1-8b/org": (1, 20, (0,)),
    "llama-3.1-8b/fp8_kv8": (1, 24, (1,)),
    "llama-3.1-8b/awq": (1, 21, (2,)),
    "llama-3-8b/qoq": (1, 10, (3,)),
}

Profile = Mapping[str, Mapping[int, Sequence[Row]]]


def read_profile(path: str) -> Profile:
    """By model/format, then by degree, of whole GPUs.  ValueError for a file that is not such a table."""
    found: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    try:
        with Path(path).open(newline="") as lines:
            for r in csv.DictReader(lines):
                if r["mps_percentage"] == "100":
                    sizes = (int(r[k]) for k in ("batch_size", "input_len", "output_len"))
                    row = Row(*sizes, float(r["ttft"]), float(r["decode_time"]))
                    found[f"{r['model']}/{r['qformat']}"][int(r["tp"])].append(row)
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path!r} must be a table of costs in FineServe's form: {error!r}") from None
    if missing := MODELS.keys() - found.keys():
        raise ValueError(f"{path!r} has no rows of {', '.join(sorted(missing))}")
    return found


def seven(profile: Profile) -> list[Llm]:
    return [
        Llm(
            name=name, billions=billions, bits=bits, layers=layers, kv_heads=8, head_dim=head, rate=rate,
            profile=profile[name], zeros=name.endswith("qoq"), base_tp=base,
        )
        for name, (billions, bits, layers, head, rate, base) in MODELS.items()
    ]  # fmt: skip


def run_fineserve(path: str) -> dict[str, Any]:
    """Prints the table; `targets`: the same as theirs."""
    llms = seven(read_profile(path))
    rows = []
    print(f"{'model':<22} {'tp':>3} {'batch':>6} {'need GB':>8}  GPUs")
    for p in slab_aware(llms, [EVERY], slo_scale=SLO_SCALE):
        name = llms[p.model].name
        same = (p.choice.tp, p.choice.batch, p.gpus) == AS_THEIRS[name]
        gpus = ", ".join(map(str, p.gpus)) or "none"
        print(
            f"{name:<22} {p.choice.tp:>3} {p.choice.batch:>6} {p.need_gb:>8.2f}  {gpus}{'' if same else ' (theirs differs)'}"
        )
        rows.append(
            {
                "tag": "simulated",
                "model": name,
                "tp": p.choice.tp,
                "batch": p.choice.batch,
                "need_gb": round(p.need_gb, 2),
                "gpus": list(p.gpus),
                "same": same,
            }
        )
    whole = len(rows) == len(AS_THEIRS) and all(r["same"] for r in rows)
    return {"targets": {"as their code placed them": whole}, "rows": rows}
