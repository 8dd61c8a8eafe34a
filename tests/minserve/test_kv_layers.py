"""KV formats by layer: what each layer stores is its own format, and layers of fewer bytes share slabs."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.kv_layout import KvLayout
from minserve import LLM, SamplingParams
from minserve.config import Config
from minserve.llm import kl_divergence
from minserve.resolve import resolve_model
from minserve.slab_table import SlabTable
from quant.ptq import fake
from quant.ptq.model import Hooks, Source, embed, forward, logits
from sched.slabs import ModelShape, solve
from tests.e2e.test_triton_engine import DEVICE, on_triton
from tests.tiny import write_llama

IDS = [(7 * i * i + 3 * i) % 290 for i in range(60)]
MIX = {"model.layers.0": "fp32", "model.layers.[12]": "int4", "re:model.layers.3$": "int4z"}
FORMATS = ("fp32", "int4", "int4", "int4z", "int8")
STEPS: dict[str, Any] = {"max_model_len": 128, "pool_bytes": 24 << 20, "kv_dtype": "int8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 5}
    return write_llama(tmp_path_factory.mktemp("layers"), seed=4, head_dim=32, **sizes)


class Cache(Hooks):
    def __init__(self, fmt: str) -> None:
        self.fmt = fmt

    def kv(self, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return fake.kv(self.fmt, k_BTGK, v_BTGK)


def by_hand(folder: Path, formats: tuple[str, ...]) -> torch.Tensor:
    """Logits of a plain forward pass with each layer's keys and values rounded."""
    source = Source(folder)
    outer = source.outer()
    x_BTD = embed(outer, torch.tensor([IDS]))
    for i, fmt in enumerate(formats):
        x_BTD = forward(source.layer(i), source.shape, x_BTD, Cache(fmt))
    return logits(outer, source.shape, x_BTD)[0]


def run(folder: Path, **keys: Any) -> torch.Tensor:
    with LLM(folder, device="cpu", **STEPS | keys) as llm:
        return llm.logits(IDS)


def test_each_layer_stores_its_own_format(folder: Path) -> None:
    found = run(folder, kv_dtype_overrides=MIX)
    assert kl_divergence(by_hand(folder, FORMATS), found) < 1e-9
    for wrong in (FORMATS[::-1], ("int8",) * 5, ("fp32", "int4", "int4z", "int4", "int8")):
        assert kl_divergence(by_hand(folder, wrong), found) > 1e-6, wrong


def test_one_format_for_all_is_that_format(folder: Path) -> None:
    mixed = run(folder, kv_dtype_overrides={"*": "int4"}, kv_block_tokens=32)
    assert torch.equal(mixed, run(folder, kv_dtype="int4", kv_block_tokens=32))


def test_chunks_and_batches_change_no_token(folder: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    prompts = [IDS[:40], IDS[3:20], IDS[:7]]
    made = []
    for steps in (512, 16):
        keys = {"kv_dtype_overrides": MIX, "max_num_batched_tokens": steps, "max_num_seqs": 4}
        with LLM(folder, device="cpu", **STEPS | keys) as llm:
            made.append([o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)])
    assert made[0] == made[1]


def test_triton_stores_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = STEPS | {"kv_dtype_overrides": MIX, "max_num_batched_tokens": 48, "max_num_seqs": 4}
    with on_triton(monkeypatch) as ran, LLM(folder, device=DEVICE, cuda_graphs=False, **keys) as llm:
        found = llm.logits(IDS)
    assert {"_attn_prefill_kernel", "_attn_decode_kernel", "_kv_dequant_kernel"} <= ran
    assert kl_divergence(by_hand(folder, FORMATS), found) < 1e-6


def test_a_whole_engine_adds_up(folder: Path) -> None:
    """More requests than the pool holds at once, so that sets come and go."""
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    with LLM(folder, device="cpu", **STEPS | {"kv_dtype_overrides": MIX, "pool_bytes": 17 << 20}) as llm:
        alone = llm.generate([IDS[:9]], params, use_tqdm=False)[0].outputs[0].token_ids
        many = llm.generate([IDS[:9], *([IDS[i:] for i in range(40)])], params, use_tqdm=False)
    assert many[0].outputs[0].token_ids == alone


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"model.layers.9": "int8"}, r"must match layers, named model.layers.0 to model.layers.4, got 'model.layers.9'"),
        ({"*": "bf16"}, "kv_dtype_overrides must be one of auto, fp32, .*got 'bf16'"),
        ({"*": "int3"}, 'must be one of .*int4.*, got "int3"'),
        ({"re:(": "int8"}, "must be a regular expression"),
        ("int8", "must be a mapping of at most 1024 layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(folder: Path, overrides: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        resolve_model(Config.single(folder, kv_dtype_overrides=overrides).models[0], "cpu")


@pytest.mark.parametrize("runs", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_layers_of_fewer_bytes_share_slabs(runs: int) -> None:
    """No byte of a set belongs to two layers, none lies outside its slab, and little is left over."""
    rng = random.Random(3)
    for _ in range(runs):
        formats = [rng.choice(("bf16", "int8", "int4", "int4z")) for _ in range(rng.randint(2, 48))]
        sizes = tuple(KvLayout(fmt, 8, 128, 32).block_bytes for fmt in formats)
        shape = ModelShape(
            name="m", layers=len(sizes), block_bytes=max(sizes), block_tokens=32, max_model_len=4096, layer_bytes=sizes
        )  # fmt: skip
        plan = solve([shape], 64 << 30)
        held = plan.models["m"]
        assert len(held.places) == len(sizes)
        used: dict[int, list[tuple[int, int]]] = {}
        for (slab, byte), size in zip(held.places, sizes, strict=True):
            assert byte >= 0
            assert byte % 16 == 0
            assert byte + held.slots * size <= plan.slab_bytes
            used.setdefault(slab, []).append((byte, byte + held.slots * size))
        assert used.keys() == set(range(held.layers))
        for spans in used.values():
            spans.sort()
            assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        live = held.slots * sum(sizes)
        assert held.tail_waste == pytest.approx(1 - live / (held.layers * plan.slab_bytes))
        # each size may leave one slab partly filled, and every slab its tail
        assert held.layers <= sum(sizes) / max(sizes) / 0.9 + 4


def test_the_table_tells_other_processes(tmp_path: Path) -> None:
    sizes = (64 << 10, 32 << 10, 32 << 10)
    shape = ModelShape(
        name="m", layers=3, block_bytes=64 << 10, block_tokens=32, max_model_len=64, layer_bytes=sizes
    )
    plan = solve([shape], 256 << 20)
    table = SlabTable.create(plan)
    other = SlabTable.attach(table.fd)
    assert other.plan == plan
    assert plan.models["m"].layers == 2
    other.close()
    table.close()


def test_shapes_that_contradict_themselves_are_refused() -> None:
    for sizes in ((1, 2), (64, 65, 64), (0, 64, 64)):
        with pytest.raises(ValueError, match="layer_bytes must be 3 sizes"):
            ModelShape(
                name="m", layers=3, block_bytes=64, block_tokens=16, max_model_len=64, layer_bytes=sizes
            )
