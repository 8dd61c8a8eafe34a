"""Each fold does what it is for: ranges fall, errors fall, orders are orders; and bad options are refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant.ptq.attention_scales import scale_keys, search_attention, smooth_attention, tied
from quant.ptq.awq import Objective, awq
from quant.ptq.fireq_scales import equalize, scale_keys_for_cache, scale_values
from quant.ptq.model import Hooks, Layer
from quant.ptq.pairs import consumers, inject_outer_outliers, inject_outliers, move
from quant.ptq.reorder import reorder, residual_order
from quant.ptq.rotate import hadamard, orthogonal, rotate_layer, rotate_outer, rotation
from quant.ptq.shape import Shape
from quant.ptq.smooth import smooth
from quant.ptq.stats import Stats
from tests.quant.ptq.ground import GQA, SHAPES, Model, group_round, random_model, row_round, token_ids

IDS = token_ids()
CHANNELS = (2, 9, 30, 31, 40, 63)


def spike(x: Tensor) -> float:
    """How far the largest channel stands out of the usual one."""
    return float(x.abs().amax() / x.abs().median())


def ready(case: str = "gqa", inject: bool = False) -> tuple[Model, Layer, Shape, Stats]:
    model = random_model(SHAPES[case])
    for layer in model.layers if inject else ():
        inject_outliers(layer, model.shape, CHANNELS, 50.0)
    return model, model.layers[1], model.shape, model.stats(IDS)[1]


def product_error(layer: Layer, stats: Stats, linear: str) -> float:
    """Relative squared error of the product of 8-bit rows and 8-bit channels, on the sampled rows."""
    x_TK, w_NK = stats.inputs[linear].sample_TK, layer[f"{linear}.weight"]
    assert x_TK is not None
    y_TN = x_TK @ w_NK.T
    return float((row_round(x_TK) @ row_round(w_NK).T - y_TN).square().sum() / y_TN.square().sum())


class Int4Keys(Hooks):
    """A 4-bit cache of keys, with what FireQ does at run time."""

    def __init__(self, channel_GK: Tensor | None = None) -> None:
        self.channel_GK = torch.ones(1) if channel_GK is None else channel_GK

    def kv(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        return row_round(k_BTGK / self.channel_GK, 7) * self.channel_GK, v_BTGK


def cache_error(model: Model, want: Tensor, channels: list[Tensor] | None = None) -> float:
    hooks = [Int4Keys(c) for c in channels or [None, None]]
    return float((model.run(IDS, lambda i: hooks[i]) - want).square().mean())


def test_injected_outliers_are_in_the_activations_and_ruin_plain_rounding() -> None:
    model = random_model()
    plain = model.stats(IDS)[0]
    errors = [product_error(model.layers[0], plain, n) for n in ("self_attn.q_proj", "mlp.up_proj")]
    for layer in model.layers:
        inject_outliers(layer, GQA, CHANNELS, 50.0)
    stats = model.stats(IDS)[0]
    times_K = stats.inputs["mlp.up_proj"].absmax_K / plain.inputs["mlp.up_proj"].absmax_K
    want_K = torch.ones(64).double()
    want_K[list(CHANNELS)] = 50
    assert torch.allclose(times_K, want_K, rtol=1e-9)
    worse = [product_error(model.layers[0], stats, n) for n in ("self_attn.q_proj", "mlp.up_proj")]
    assert all(b > 15 * a for a, b in zip(errors, worse, strict=True)), (errors, worse)


@pytest.mark.parametrize("channels", [(), (64,), (-1, 3)])
def test_channels_that_are_not_there_are_refused(channels: tuple[int, ...]) -> None:
    model = random_model()
    with pytest.raises(ValueError, match=r"channels must be some of \[0, 64\)"):
        inject_outliers(model.layers[0], GQA, channels, 50.0)
    with pytest.raises(ValueError, match="factor must be above 0"):
        inject_outer_outliers(model.outer, GQA, [1], 0.0)


def test_smoothing_moves_range_into_the_weights() -> None:
    _, layer, shape, stats = ready(inject=True)
    before_x, before_w = (
        spike(stats.inputs["mlp.up_proj"].absmax_K),
        spike(consumers(layer, "gate_up").abs().amax(0)),
    )
    error = product_error(layer, stats, "mlp.up_proj")
    smooth(layer, shape, stats, alpha=0.5)
    x_K, w_K = stats.inputs["mlp.up_proj"].absmax_K, consumers(layer, "gate_up").abs().amax(0)
    assert spike(x_K) < before_x / 5
    assert product_error(layer, stats, "mlp.up_proj") < error / 20
    # the defining property of alpha = 1/2: both sides end with one range, sqrt(max|x| max|W|)
    assert torch.allclose(x_K, w_K, rtol=1e-9)
    assert before_w < before_x


def test_alpha_one_makes_activations_flat_and_alpha_zero_weights() -> None:
    for alpha, flat in ((1.0, 0), (0.0, 1)):
        _, layer, shape, stats = ready("mha")
        smooth(layer, shape, stats, alpha=alpha, pairs=("o", "down"))
        for linear, pair in (("self_attn.o_proj", "o"), ("mlp.down_proj", "down")):
            ends = (stats.inputs[linear].absmax_K, consumers(layer, pair).abs().amax(0))
            assert torch.allclose(ends[flat], torch.ones_like(ends[flat]), rtol=1e-9)
            assert spike(ends[1 - flat]) > 1.2


def test_a_channel_without_activations_or_weights_is_left_alone() -> None:
    model, layer, shape, _ = ready()
    layer["input_layernorm.weight"][5] = 0
    for name in ("q", "k", "v"):
        layer[f"self_attn.{name}_proj.weight"][:, 7] = 0
    want, old = model.run(IDS), layer["input_layernorm.weight"].clone()
    smooth(layer, shape, model.stats(IDS)[1], alpha=0.5)
    assert torch.equal(layer["input_layernorm.weight"][[5, 7]], old[[5, 7]])
    assert (model.run(IDS) - want).abs().max() < 1e-9


@pytest.mark.parametrize("seed", [0, None])
def test_rotation_spreads_outliers_of_the_residual_stream(seed: int | None) -> None:
    model = random_model(replace(GQA, vocab=60))
    ids = IDS % 60
    before = model.stats(ids)[1]
    turn = rotation(model.shape, seed=seed)
    for layer in model.layers:
        rotate_layer(layer, model.shape, turn)
    rotate_outer(model.outer, turn)
    after = model.stats(ids)[1]
    for linear in ("self_attn.q_proj", "mlp.up_proj"):
        assert spike(before.inputs[linear].absmax_K) > 5
        assert spike(after.inputs[linear].absmax_K) < 2
    assert all(bool((layer["input_layernorm.weight"] == 1).all()) for layer in model.layers)


def test_rotation_spreads_outliers_of_values() -> None:
    model, layer, shape, _ = ready()
    layer["self_attn.v_proj.weight"][[3, 20]] *= 30
    before = model.stats(IDS)[1].heads.value_GK
    rotate_layer(layer, shape, rotation(shape, residual=False))
    after = model.stats(IDS)[1].heads.value_GK
    assert spike(before) > 10
    assert spike(after) < 3


ORDERS = (1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 60, 64, 76, 84, 104, 128, 200, 576, 640, 768, 960, 1536)


@pytest.mark.parametrize("n", ORDERS)
def test_hadamard_matrices_are(n: int) -> None:
    h = hadamard(n)
    assert h is not None
    assert h.shape == (n, n)
    assert bool((h.abs() == 1).all())
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 5, 6, 10, 54, 92])
def test_orders_without_a_hadamard_of_ours_get_a_random_rotation(n: int) -> None:
    assert hadamard(n) is None
    q, eye = orthogonal(n).apply(torch.eye(n)), torch.eye(n, dtype=torch.float64)
    assert torch.allclose(q @ q.T, eye, atol=1e-12)
    assert not torch.allclose(q.abs(), eye)


@pytest.mark.parametrize("n", [1, 12, 64, 768, 8192 * 3])
def test_a_rotation_by_factors_is_the_whole_matrix(n: int) -> None:
    turn = orthogonal(n, seed=3)
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if n <= 768:
        whole = hadamard(n)
        assert whole is not None
        assert torch.allclose(turn.apply(x), (x * turn.signs_D) @ whole / n**0.5, atol=1e-12)
        assert set(turn.signs_D.tolist()) == ({-1.0, 1.0} if n > 1 else {float(turn.signs_D[0])})
    assert torch.allclose(turn.apply(x).norm(dim=1), x.norm(dim=1))
    assert len(turn.factors) == 0 or max(len(f) for f in turn.factors) <= 64


@pytest.mark.parametrize("how", ["alpha", "search"])
def test_smooth_attention_narrows_keys_and_helps_a_4_bit_cache(how: str) -> None:
    model = random_model()
    want = model.run(IDS)
    error, stats = cache_error(model, want), model.stats(IDS)
    before = [spike(tied(s.heads.after_GK)) for s in stats]
    for layer, one in zip(model.layers, stats, strict=True):
        if how == "alpha":
            smooth_attention(layer, model.shape, one, alpha=0.5)
        else:
            alpha_G = search_attention(layer, model.shape, one, quantize=lambda k: row_round(k, 7))
            assert float(alpha_G.min()) >= 0
            assert float(alpha_G.max()) > 0
    after = [spike(tied(s.heads.after_GK)) for s in model.stats(IDS)]
    assert all(b < 0.6 * a for a, b in zip(before, after, strict=True)), (before, after)
    assert cache_error(model, want) < error / 2


def test_scales_that_differ_in_a_rope_pair_are_refused() -> None:
    """They would not commute with the rotation: the negative control of every scaling of keys."""
    model, layer, shape, _ = ready()
    m_GK = torch.ones(2, 16).double()
    m_GK[0, 3] = 2
    with pytest.raises(AssertionError, match="alike in both channels of a RoPE pair"):
        scale_keys(layer, shape, m_GK)
    want = model.run(IDS)
    layer["self_attn.k_proj.weight"][3] *= 2
    layer["self_attn.q_proj.weight"][[3, 19]] /= 2
    assert (model.run(IDS) - want).abs().max() > 1e-3


@pytest.mark.parametrize("top_k", [0, 3, 16])
def test_fireq_brings_keys_to_alpha_and_beta(top_k: int) -> None:
    _, layer, shape, stats = ready()
    old, after_GK = layer["self_attn.k_proj.weight"].clone(), stats.heads.after_GK.clone()
    channel_GK = scale_keys_for_cache(layer, shape, stats, alpha=8.0, beta=6.0, top_k=top_k)
    picked_GK = channel_GK != 1
    top_GX = after_GK.topk(top_k, dim=1).indices
    assert bool(picked_GK.gather(1, top_GX).all())
    assert torch.equal(picked_GK, tied(picked_GK.double()) > 0)
    assert picked_GK.sum(1).amax() <= 2 * top_k
    pair_GK = torch.cat((stats.heads.pair_GI, stats.heads.pair_GI), dim=1)
    assert torch.allclose(pair_GK[~picked_GK], torch.full_like(pair_GK[~picked_GK], 8.0))
    at_run_time_GK = stats.heads.after_GK / channel_GK
    assert torch.allclose(at_run_time_GK[picked_GK], torch.full_like(at_run_time_GK[picked_GK], 6.0))
    # what is scaled at run time is not scaled before
    same_N = (layer["self_attn.k_proj.weight"] == old).all(1).view(2, 16)
    assert torch.equal(same_N, picked_GK)


def test_fireq_helps_a_4_bit_cache() -> None:
    model = random_model()
    want = model.run(IDS)
    error, stats = cache_error(model, want), model.stats(IDS)
    channels = [
        scale_keys_for_cache(layer, model.shape, one, top_k=3)
        for layer, one in zip(model.layers, stats, strict=True)
    ]
    assert cache_error(model, want, channels) < error / 2


@pytest.mark.parametrize(("constant", "kind"), [(0.0096, "mean"), (None, "mean"), (0.1, "max")])
def test_equalizing_makes_columns_one_size(constant: float | None, kind: str) -> None:
    _, layer, shape, _ = ready()
    layer["mlp.up_proj.weight"][:, 8] *= 30
    size = {"mean": lambda w: w.abs().mean(0), "max": lambda w: w.abs().amax(0)}[kind]
    before_D = size(consumers(layer, "gate_up"))
    error = (consumers(layer, "gate_up") - group_round(consumers(layer, "gate_up"))).norm() / consumers(
        layer, "gate_up"
    ).norm()
    equalize(layer, shape, pairs={"gate_up": constant}, kind=kind)
    w_NK = consumers(layer, "gate_up")
    want = before_D.log().mean().exp() if constant is None else constant
    assert torch.allclose(size(w_NK), torch.full_like(before_D, float(want)), rtol=1e-9)
    assert (w_NK - group_round(w_NK)).norm() / w_NK.norm() < error


def test_the_scale_of_o_is_the_mean_over_query_heads() -> None:
    _, layer, shape, _ = ready()
    o_DHK = layer["self_attn.o_proj.weight"].clone().view(64, 4, 16)
    v_GKD = layer["self_attn.v_proj.weight"].clone().view(2, 16, 64)
    equalize(layer, shape, pairs={"o": 0.02})
    lambda_HK = 0.02 / o_DHK.abs().mean(0)
    lambda_GK = torch.stack((lambda_HK[:2].mean(0), lambda_HK[2:].mean(0)))
    assert torch.allclose(layer["self_attn.v_proj.weight"].view(2, 16, 64), v_GKD / lambda_GK[..., None])
    assert torch.allclose(
        layer["self_attn.o_proj.weight"].view(64, 4, 16), o_DHK * lambda_GK.repeat_interleave(2, 0)
    )


def test_the_factor_of_values() -> None:
    _, layer, shape, stats = ready()
    v_XD, value_GK = layer["self_attn.v_proj.weight"].clone(), stats.heads.value_GK.clone()
    scale_values(layer, shape, 0.9, stats)
    assert torch.allclose(layer["self_attn.v_proj.weight"], v_XD * 0.9)
    assert torch.allclose(stats.heads.value_GK, value_GK * 0.9)


@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("kind", ["plain", "duo", "smooth"])
def test_a_search_finds_a_scale_that_quantizes_better(kind: str, with_rows: bool) -> None:
    model, layer, shape, _ = ready(inject=True)
    stats = model.stats(IDS, sample=1000)[1]
    objective = Objective(lambda name, w: group_round(w), row_round if with_rows else None)
    inputs, pairs = {n: s.sample_TK.clone() for n, s in stats.inputs.items()}, ("gate_up", "down")
    old = {n: layer[f"mlp.{n}_proj.weight"].clone() for n in ("gate", "up")}
    # every second output of the 96
    objective = objective._replace(outputs=48)
    chosen = awq(layer, shape, stats, objective=objective, kind=kind, grid=6, pairs=pairs)
    assert set(chosen) == set(pairs)
    assert chosen["gate_up"].after < 0.6 * chosen["gate_up"].before
    assert chosen["down"].after <= chosen["down"].before
    # the errors reported are those of the products
    s_K, before, after = layer["mlp.gate_proj.weight"][0] / old["gate"][0], 0.0, 0.0
    x_TK = inputs["mlp.up_proj"]
    for w_NK in (w[::2] for w in old.values()):
        y_TN = x_TK @ w_NK.T
        plain, scaled = (row_round(x) if with_rows else x for x in (x_TK, x_TK / s_K))
        before += float((plain @ group_round(w_NK).T - y_TN).square().sum())
        after += float((scaled @ group_round(w_NK * s_K).T - y_TN).square().sum())
    assert chosen["gate_up"].before == pytest.approx(before, rel=1e-6)
    assert chosen["gate_up"].after == pytest.approx(after, rel=1e-6)


def test_a_search_that_finds_nothing_better_changes_nothing() -> None:
    model, layer, shape, stats = ready()
    before = model.copy()
    chosen = awq(layer, shape, stats, objective=Objective(lambda name, w: w), grid=3)
    assert all(c.ratio is None and c.before == c.after == 0 for c in chosen.values())
    assert all(torch.equal(t, before.layers[1][n]) for n, t in layer.items())


def test_reordering_gathers_alike_inputs() -> None:
    _, layer, shape, stats = ready()
    before = stats.inputs["mlp.down_proj"].absmax_K.clone()
    reorder(layer, shape, stats)
    x_F = stats.inputs["mlp.down_proj"].absmax_K
    assert torch.equal(x_F, before.sort(descending=True).values)
    assert not torch.equal(x_F, before)
    inside_GK = stats.inputs["self_attn.o_proj"].absmax_K.view(2, 2, 16).amax(1)
    assert torch.equal(inside_GK, inside_GK.sort(dim=1, descending=True).values)


def test_the_order_of_the_residual_stream_is_one_for_all_layers() -> None:
    assert residual_order(torch.tensor([[1.0, 5.0, 3.0], [2.0, 9.0, 8.0]])).tolist() == [1, 2, 0]


def test_bad_options_name_the_choices() -> None:
    model, layer, shape, stats = ready()
    objective, bare = Objective(lambda name, w: w), model.stats(IDS, sample=0)[1]
    bare.inputs["self_attn.q_proj"].hessian_KK = None
    for words, call in {
        "alpha and beta must be in": lambda: smooth(layer, shape, stats, alpha=1.5),
        "pair must be one of qkv, o, gate_up, down, got 'x'": lambda: smooth(
            layer, shape, stats, pairs=("x",)
        ),
        "pair must be one of qkv, o": lambda: equalize(layer, shape, pairs={"x": 1.0}),
        "constant of down must be above 0": lambda: equalize(layer, shape, pairs={"down": 0.0}),
        "kind must be one of mean, max": lambda: equalize(layer, shape, pairs={}, kind="least"),
        "kind must be one of plain, duo": lambda: awq(layer, shape, stats, objective=objective, kind="x"),
        "grid must be at least 1": lambda: awq(layer, shape, stats, objective=objective, grid=0),
        "needs statistics with Hessians": lambda: awq(layer, shape, bare, objective=objective),
        "with quantized rows needs": lambda: awq(
            layer, shape, bare, objective=Objective(objective.weight, row_round)
        ),
        "alpha must be in": lambda: smooth_attention(layer, shape, stats, alpha=-0.1),
        "needs statistics with a sample": lambda: search_attention(layer, shape, bare, quantize=row_round),
        "top_k must be in .0, head_dim = 16.": lambda: scale_keys_for_cache(layer, shape, stats, top_k=17),
        "alpha and beta must be above 0": lambda: scale_keys_for_cache(layer, shape, stats, alpha=0.0),
        "reordered of o, down alone, got 'qkv'": lambda: reorder(layer, shape, stats, pairs=("qkv",)),
        "order of a rotation must be at least 1": lambda: orthogonal(0),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(AssertionError, match="scales of down must be positive"):
        move(layer, shape, "down", torch.zeros(96).double())
