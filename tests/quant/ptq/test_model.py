"""The plain-torch Llama of quant.ptq against transformers' in float64, and the reading of its folder."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.ptq.model import LINEARS, Hooks, Source, embed, forward, logits, rms_norm
from quant.ptq.shape import read_shape
from tests.tiny import write_llama

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": LLAMA3},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "head_dim": {"head_dim": 24},
}
IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))


def run(source: Source, ids_BT: Tensor = IDS, hooks: Hooks | None = None) -> Tensor:
    outer = source.outer(torch.float64)
    x_BTD = embed(outer, ids_BT)
    for i in range(source.shape.layers):
        x_BTD = forward(source.layer(i, torch.float64), source.shape, x_BTD, hooks or Hooks())
    return logits(outer, source.shape, x_BTD)


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch):
    """transformers' logits in float64; its norm would round to float32 on the way."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda s, x: rms_norm(x, s.weight, s.variance_epsilon))

    def compute(folder: Path, ids_BT: Tensor = IDS) -> Tensor:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
        with torch.no_grad():
            return model.eval()(ids_BT).logits

    return compute


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path, oracle) -> None:
    folder = write_llama(tmp_path, **CASES[case])
    got, want = run(Source(folder)), oracle(folder)
    assert got.dtype == torch.float64
    assert (got - want).abs().max() < 1e-9 * want.abs().max()


def test_shards_and_the_old_spelling_of_the_config(tmp_path: Path, oracle) -> None:
    whole = write_llama(tmp_path / "a", rope_parameters=LLAMA3)
    folder = write_llama(tmp_path / "b", rope_parameters=LLAMA3, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    config = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling
    (folder / "config.json").write_text(json.dumps(config))
    assert read_shape(folder) == read_shape(whole)
    assert torch.equal(run(Source(folder)), run(Source(whole)))


def test_a_layer_has_memory_of_its_own(tmp_path: Path) -> None:
    source = Source(write_llama(tmp_path))
    first = source.layer(0)
    first["self_attn.q_proj.weight"].zero_()
    assert source.layer(0)["self_attn.q_proj.weight"].abs().max() > 0
    assert {t.dtype for t in first.values()} == {torch.float32}
    assert source.nbytes == sum(t.nbytes for t in load_file(source.files["model.norm.weight"]).values())


class Watch(Hooks):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def input(self, name: str, x: Tensor) -> None:
        self.seen.append(name)

    def keys(self, k_BTGK: Tensor) -> None:
        self.before = k_BTGK

    def kv(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        self.after = k_BTGK
        return k_BTGK, torch.zeros_like(v_BTGK)


def test_hooks_see_every_input_and_may_replace(tmp_path: Path) -> None:
    source, watch = Source(write_llama(tmp_path)), Watch()
    replaced = run(source, hooks=watch)
    assert watch.seen == [*LINEARS] * 2
    assert watch.before.shape == watch.after.shape == (2, 40, 2, 16)
    pairs = [k.view(2, 40, 2, 2, 8).square().sum(-2) for k in (watch.before, watch.after)]
    assert torch.allclose(*pairs, rtol=1e-6)
    assert not torch.allclose(watch.before, watch.after)
    assert (replaced - run(source)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen2"}, "model_type must be 'llama', got 'qwen2'"),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type must be one of default"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor must be a number"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization starts from plain weights"),
        ({"num_key_value_heads": 3}, "a divisor of num_attention_heads=4"),
        ({"hidden_size": "64"}, "hidden_size must be an integer"),
        ({"hidden_size": 128}, "must be .300, 128., got .300, 64."),
        ({"attention_bias": True}, "q_proj.bias' is missing"),
        ({"num_hidden_layers": 1}, "no place for tensor 'model.layers.1"),
        ({"tie_word_embeddings": True}, "differs from the embeddings"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, words: str, tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        Source(folder)
    if "quantization_config" in change:
        # whose shape is wanted all the same, to compare it with what it was made of
        assert read_shape(folder).hidden == 64


ODD = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2**24,
    2**70,
    0.5,
    1e300,
    "",
    "64",
    [],
    [1],
    {},
    {"rope_type": ["x"]},
    {"factor": {}},
)


def test_odd_values_of_every_key_give_an_error_that_names_the_file(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, rope_parameters=LLAMA3)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    places: list[tuple[str, ...]] = [(k,) for k in config] + [("rope_parameters", k) for k in LLAMA3]
    refused = 0
    for place, odd in itertools.product([*places, ("rope_scaling",), ("head_dim",), ("rope_theta",)], ODD):
        changed = json.loads(json.dumps(config))
        (changed["rope_parameters"] if len(place) > 1 else changed)[place[-1]] = odd
        path.write_text(json.dumps(changed))
        try:
            Source(folder)
        except ValueError as error:
            assert str(folder) in str(error), (place, odd)  # noqa: PT017
            refused += 1
    assert refused > 200


def test_damaged_weights_and_indices_give_an_error(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, max_shard_size="100KB")
    r, index, shard = (
        random.Random(3),
        folder / "model.safetensors.index.json",
        sorted(folder.glob("*.safetensors"))[0],
    )
    refused = 0
    for file, reach in ((index, 3000), (shard, 1500)):
        whole = file.read_bytes()
        for _ in range(60):
            data, at = bytearray(whole), r.randrange(min(reach, len(whole)))
            data[at : at + r.choice((0, 1, 4))] = r.randbytes(r.choice((0, 1, 4)))
            file.write_bytes(data if r.random() < 0.8 else data[:at])
            try:
                Source(folder).layer(0)
            except ValueError as error:
                assert str(folder) in str(error)  # noqa: PT017
                refused += 1
        file.write_bytes(whole)
    assert refused > 60


@pytest.mark.parametrize(
    "extra",
    [
        {"model.layers.0.mlp.down_proj.weight": torch.zeros(64, 12, dtype=torch.int32)},  # FireQ
        {"model.layers.0.mlp.down_proj.s1_scales": torch.zeros(64).half()},  # QServe
        {"model.layers.0.mlp.down_proj.qweight": torch.zeros(64, 48, dtype=torch.int8)},
    ],
    ids=["fireq", "qserve", "words"],
)
def test_a_quantized_model_is_told_as_such(extra: dict[str, Tensor], tmp_path: Path) -> None:
    """Without a quantization_config, as FireQ's and QServe's files come."""
    folder = write_llama(tmp_path)
    file = folder / "model.safetensors"
    save_file(load_file(file) | extra, file)
    with pytest.raises(ValueError, match=r"is already quantized .*quantization starts from plain weights"):
        Source(folder)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"extra": torch.zeros(2, dtype=torch.int8)}, file)
    with pytest.raises(ValueError, match="'extra' must be of F64, F32, F16, BF16, got I8"):
        Source(folder)
    file.write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        Source(folder)
    (folder / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        Source(folder)
