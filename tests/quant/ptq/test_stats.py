"""Statistics against what they are defined as, computed from the inputs that a layer saw."""

import pytest
import torch
from torch import Tensor

from quant.ptq.model import LINEARS, PLAIN, Hooks, embed, forward
from quant.ptq.stats import FIRST, Collector, collect, hessian_bytes
from tests.quant.ptq.ground import GQA, SHAPES, random_model, token_ids

IDS = token_ids(4, 23)


class Recorder(Hooks):
    """Everything as it came; `values` says what becomes of the values."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}

    def note(self, name: str, x: Tensor) -> None:
        self.seen.setdefault(name, []).append(x.flatten(0, 1).clone())

    def input(self, name: str, x: Tensor) -> None:
        self.note(name, x)

    def keys(self, k_BTGK: Tensor) -> None:
        self.note("before", k_BTGK)

    def query(self, q_BTHK: Tensor) -> Tensor:
        self.note("query", q_BTHK)
        return q_BTHK

    def kv(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        self.note("after", k_BTGK)
        self.note("value", v_BTGK)
        return k_BTGK, v_BTGK

    def all(self, name: str) -> Tensor:
        return torch.cat(self.seen[name])


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("case", ["gqa", "biases"])
def test_statistics_are_what_they_say(case: str, batches: int) -> None:
    model = random_model(SHAPES[case])
    x_BTD, layer, shape, recorder = embed(model.outer, IDS), model.layers[0], model.shape, Recorder()
    outputs: list[Tensor] = []
    stats = collect(
        layer, shape, x_BTD.chunk(batches), hessian=torch.float64, sample=1000, keep=outputs.append
    )
    assert torch.allclose(torch.cat(outputs), forward(layer, shape, x_BTD, recorder), rtol=1e-12)
    for name in LINEARS:
        x_TK, got = recorder.all(name), stats.inputs[name]
        assert got.rows == len(x_TK) == IDS.numel()
        for value, want in (
            (got.absmax_K, x_TK.abs().amax(0)),
            (got.absmean_K, x_TK.abs().mean(0)),
            (got.low_K, x_TK.amin(0)),
            (got.high_K, x_TK.amax(0)),
            (got.hessian_KK, x_TK.T @ x_TK),
            (got.sample_TK, x_TK),
        ):
            assert value is not None
            assert torch.allclose(value, want, rtol=1e-12, atol=1e-12)
    before_TGK, after_TGK, heads = recorder.all("before"), recorder.all("after"), stats.heads
    half = shape.head_dim // 2
    for keys_TGK in (before_TGK, after_TGK):
        # the norm of a pair is the same before and after rotation
        pair_GI = (keys_TGK[..., :half] ** 2 + keys_TGK[..., half:] ** 2).sqrt().amax(0)
        assert torch.allclose(heads.pair_GI, pair_GI, rtol=1e-6)
    assert torch.equal(heads.before_GK, before_TGK.abs().amax(0))
    assert torch.equal(heads.after_GK, after_TGK.abs().amax(0))
    assert torch.equal(heads.value_GK, recorder.all("value").abs().amax(0))
    q_THK, h = recorder.all("query"), shape.heads_per_kv
    want_GKK = torch.stack(
        [sum(q_THK[:, i].T @ q_THK[:, i] for i in range(g * h, g * h + h)) for g in range(shape.kv_heads)]
    )
    assert heads.query_gram_GKK is not None
    assert torch.allclose(heads.query_gram_GKK, want_GKK, rtol=1e-10)


def test_samples_are_spread_over_all_rows_and_do_not_grow() -> None:
    model = random_model()
    x_BTD = torch.arange(40 * 5 * 64).view(40, 5, 64).double() / 1e4 + embed(model.outer, IDS[:1, :1])
    recorder, whole = Recorder(), model.layers[0]
    forward(whole, model.shape, x_BTD, recorder)
    stats = collect(whole, model.shape, x_BTD.split(3), hessian=None, sample=30)
    x_TK, sample_TK = recorder.all("self_attn.q_proj"), stats.inputs["self_attn.q_proj"].sample_TK
    assert sample_TK is not None
    # 200 rows, every eighth: the largest power of two of rows between that leaves 15 to 30
    assert torch.allclose(sample_TK, x_TK[::8], rtol=1e-12)
    assert stats.inputs["self_attn.q_proj"].hessian_KK is None


def test_shared_inputs_are_collected_once() -> None:
    model = random_model()
    stats = collect(model.layers[0], model.shape, [embed(model.outer, IDS)])
    assert {n: id(s) for n, s in stats.inputs.items()} == {n: id(stats.inputs[FIRST[n]]) for n in LINEARS}
    different = {id(s): s for s in stats.inputs.values()}.values()
    hessians = [s.hessian_KK for s in different if s.hessian_KK is not None]
    assert {h.dtype for h in hessians} == {torch.float32}
    assert sum(h.nbytes for h in hessians) == hessian_bytes(GQA) == 4 * (3 * 64**2 + 96**2)


class Replace(Hooks):
    def linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = PLAIN.linear(name, x, weight, bias)
        return y * 2 if name in ("self_attn.k_proj", "self_attn.q_proj") else y

    def query(self, q_BTHK: Tensor) -> Tensor:
        return q_BTHK / 2

    def kv(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        return k_BTGK / 2, v_BTGK * 3


def test_a_collector_sees_and_passes_on_what_its_inner_hooks_replace() -> None:
    model = random_model()
    x_BTD, layer, shape = embed(model.outer, IDS), model.layers[0], model.shape
    collector = Collector(shape, inner=Replace())
    out_BTD = forward(layer, shape, x_BTD, collector)
    plain, got = collect(layer, shape, [x_BTD]), collector.stats()
    assert torch.equal(out_BTD, forward(layer, shape, x_BTD, Replace()))
    assert torch.allclose(got.heads.after_GK, plain.heads.after_GK * 2)
    assert torch.allclose(
        got.inputs["self_attn.o_proj"].absmax_K, plain.inputs["self_attn.o_proj"].absmax_K * 3
    )


def test_no_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one calibration row"):
        collect(random_model().layers[0], GQA, [])
