"""`python -m minserve.place CONFIG --memory`: the plan that is served, the others' units, and mistakes in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from minserve.agent import Agent
from minserve.config import load_config
from minserve.place import main
from sched.slabs import MAX_TAIL

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo.yaml"
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def placed(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[list[str], dict[str, Any]]:
    """Lines for people, and the object of the last line."""
    assert main(["--memory", *args]) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines[:-1], json.loads(lines[-1])


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["--memory", *args]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.count("\n") == 1
    return said.err


def write_config(tmp_path: Path, text: str, **changes: Any) -> str:
    """A YAML file beside the folder of an 8B model without weights."""
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "models" / "llama" / "config.json").write_text(json.dumps(LLAMA_8B | changes))
    (tmp_path / "config.yaml").write_text(text)
    return str(tmp_path / "config.yaml")


def test_the_demo_is_planned_as_it_is_served(capsys: pytest.CaptureFixture[str]) -> None:
    lines, said = placed(capsys, str(DEMO))
    (pool,) = said["pools"]
    assert "\n".join(lines) in (ROOT / "docs" / "kv-slabs.md").read_text()
    agent = Agent(load_config(DEMO), {})
    try:
        served = agent.pools[0].plan
        assert (pool["slab_bytes"], pool["num_slabs"]) == (served.slab_bytes, served.num_slabs)
        for m in pool["models"]:
            shape = served.models[m["name"]]
            assert (m["block_tokens"], m["slots"], m["reserve_sets"]) == (
                shape.block_tokens,
                shape.slots,
                shape.reserve_sets,
            )
            assert m["set"]["unit_tokens"] == shape.set_tokens
            assert m["set"]["units"] == served.max_sets(m["name"]) >= 200
            assert any(line.split()[0] == m["name"] for line in lines[1:])
    finally:
        for p in agent.pools:
            p.close()


def test_full_yaml_and_what_others_would_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "examples" / "full.yaml").read_text().replace("pool_bytes: 1 GiB", "pool_bytes: 40 GiB")
    lines, said = placed(capsys, write_config(tmp_path, text))
    (pool,) = said["pools"]
    assert 2 << 20 <= pool["slab_bytes"] <= 3 << 20
    assert pool["lcm_pools"] == [["llama", "llama-w8", "llama-w4"]]
    one, two, three = pool["models"]
    assert [m["kv_dtype"] for m in (one, two, three)] == ["bf16", "int8", "int4"]
    for m in pool["models"]:
        assert 0 <= m["set"]["tail"] <= MAX_TAIL
        assert m["slots"] * m["block_bytes"] <= pool["slab_bytes"]
        assert m["lcm"]["tail"] == 0  # what the least common multiple is for
        assert pool["lcm_slab_bytes"] % (m["block_bytes"] // 2) == 0
        assert m["lcm"]["unit_bytes"] == 2 * m["layers"] * pool["lcm_slab_bytes"]
        assert m["pages"]["unit_bytes"] == 64 * (2 << 20)
        assert m["set"]["unit_bytes"] < m["pages"]["unit_bytes"] < m["lcm"]["unit_bytes"]
    # two scales of two bytes a token and head, in the block
    assert (one["scale_bytes"], two["scale_bytes"]) == (0, 32 * 8 * 4)
    assert two["block_bytes"] == 32 * 8 * (2 * 128 + 4)
    assert "2 x LCM" in lines[-1]


def test_ranks_store_their_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(tmp_path, "models: [{name: m, path: models/llama, kv_dtype: int8}]")
    for tp, heads in ((1, 8), (4, 2), (16, 1)):
        _, said = placed(capsys, file, "--tp", str(tp), "--pool-bytes", "20 GiB")
        (m,) = said["pools"][0]["models"]
        assert (m["kv_heads"], m["block_bytes"]) == (heads, 32 * heads * (2 * 128 + 4))
        assert m["set"]["tail"] <= MAX_TAIL
    assert "tp must divide the 8 KV heads" in refused(capsys, file, "--tp", "3", "--pool-bytes", "20 GiB")


def test_a_tail_that_cannot_be_helped_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One block of 65 KiB, or two of half of it, in slabs of at most 96 KiB: 68 KiB is as good as it gets."""
    text = """
nodes: [{name: a, gpus: [{device: cpu, pool_bytes: 2 GiB, slab_bytes: 96 KiB}]}]
models: [{name: m, path: models/llama, kv_dtype: int8, max_model_len: 512}]
"""
    lines, said = placed(capsys, write_config(tmp_path, text))
    (pool,) = said["pools"]
    assert pool["slab_bytes"] == 68 << 10
    assert pool["models"][0]["set"]["tail"] == pytest.approx(1 - 65 / 68, abs=1e-5)
    assert "a tail of 4.4% is the least that any slab and block leave in a pool of this size" in lines[-2]


def test_models_of_several_nodes_and_depths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
nodes:
  - {name: a, gpus: [{device: cpu, pool_bytes: 20 GiB}, {device: cpu, pool_bytes: 10 GiB}]}
  - {name: b, gpus: [{device: cpu, pool_bytes: 30 GiB}]}
models:
  - {name: m, path: models/llama, placement: [gpu0, gpu2]}
  - {name: n, path: models/short, placement: [gpu2], kv_dtype: int4}
"""
    file = write_config(tmp_path, text)
    (tmp_path / "models" / "short").mkdir()
    short = LLAMA_8B | {"num_hidden_layers": 28}
    (tmp_path / "models" / "short" / "config.json").write_text(json.dumps(short))
    lines, said = placed(capsys, file)
    assert [(p["name"], [m["name"] for m in p["models"]]) for p in said["pools"]] == [
        ("gpu0", ["m"]),
        ("gpu2", ["m", "n"]),
    ]
    assert said["pools"][1]["lcm_pools"] == [["n"], ["m"]]
    assert lines[-1].endswith("pools apart: n | m")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("models: [{name: m, path: models/llama, kv_dtype: fp32}]", "kv_dtype must be one of auto, bf16"),
        ("models: [{name: m, path: models/none}]", "no such folder"),
        ("models: [{name: m, path: models/llama, max_model_len: 9000}]", "at most the checkpoint's 8192"),
        ("modles: []", "modles"),
        ("nodes: [{name: a, gpus: [{device: cpu, pool_bytes: 1 MiB}]}]\nmodels: [{name: m, path: models/llama}]",
         "pool_bytes=1048576 is too small for m"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, write_config(tmp_path, text))
    assert said.startswith("minserve: ")
    assert says in said


def test_sizes_and_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--pool-bytes must be a size" in refused(capsys, str(DEMO), "--pool-bytes", "much")
    assert "cannot be read" in refused(capsys, str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(("flag", "value"), [("--tp", "4"), ("--tp", "1"), ("--pool-bytes", "1GiB")])
def test_a_flag_of_memory_is_said_without_it(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(DEMO), flag, value]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err == f"minserve: {flag} goes with --memory, and has no effect on a placement, got {value}\n"
