"""Loading is streamed: beyond the model itself a host holds at most 1.3 times the largest file at any time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from tests.source import ROOT
from tests.tiny import DEFAULTS

SIZES = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 24, "num_attention_heads": 4}
LAYERS_A_FILE = 8
# memory that is freed goes back at once: what is measured is what loading asks for, not what malloc keeps for later
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def write_shards(folder: Path) -> int:
    """A model of zeros in files of LAYERS_A_FILE layers; returns the bytes of the largest."""
    LlamaConfig(**DEFAULTS | SIZES, dtype="bfloat16").save_pretrained(folder)
    D, F, V = SIZES["hidden_size"], SIZES["intermediate_size"], DEFAULTS["vocab_size"]
    kv = D // SIZES["num_attention_heads"] * DEFAULTS["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (D, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D), "self_attn.o_proj": (D, D),
        "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
        "input_layernorm": (D,), "post_attention_layernorm": (D,),
    }  # fmt: skip
    outer = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    layers = [
        {f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()}
        for i in range(SIZES["num_hidden_layers"])
    ]
    files = [outer] + [
        {name: shape for layer in layers[i : i + LAYERS_A_FILE] for name, shape in layer.items()}
        for i in range(0, len(layers), LAYERS_A_FILE)
    ]
    weight_map = {}
    for i, tensors in enumerate(files):
        save_file(
            {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in tensors.items()}, folder / f"{i}.safetensors"
        )
        weight_map |= dict.fromkeys(tensors, f"{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return max(f.stat().st_size for f in folder.glob("*.safetensors"))


def test_a_load_holds_little_beside_the_model(tmp_path: Path) -> None:
    shard = write_shards(tmp_path)
    command = [sys.executable, "-m", "tests.minserve.load_memory", str(tmp_path), "none", "w4a8-int8"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | MALLOC, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["quantization"] for line in lines] == ["none", "w4a8-int8"]
    for line in lines:
        beside, kept = line["peak"] - line["stays"], line["kept"] - line["stays"]
        print(
            f"{line['quantization']}: {beside / shard:.2f} of the largest file, {kept / shard:.2f} if nothing is let go"
        )
        assert beside <= 1.3 * shard, line
        assert kept > 1.3 * shard, "the check would not see what is not let go of"
