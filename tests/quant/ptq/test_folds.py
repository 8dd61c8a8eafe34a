"""Every fold leaves the float64 logits, needs each tensor it changed, and keeps the statistics true."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quant.ptq.attention_scales import search_attention, smooth_attention
from quant.ptq.awq import Objective, awq
from quant.ptq.fireq_scales import equalize, scale_keys_for_cache, scale_values
from quant.ptq.model import HEAD, Hooks, Source
from quant.ptq.pairs import PAIRS, inject_outer_outliers, inject_outliers
from quant.ptq.reorder import permute_layer, permute_outer, reorder
from quant.ptq.rotate import rotate_layer, rotate_outer, rotation
from quant.ptq.smooth import smooth
from quant.ptq.stats import Stats
from tests.quant.ptq.ground import SHAPES, Model, group_round, random_model, row_round, token_ids
from tests.source import ROOT

IDS = token_ids()
CHANNELS = (2, 9, 30)


def each_layer(fold: Callable[..., object], **options: object) -> Callable[[Model, list[Stats]], None]:
    def apply(model: Model, stats: list[Stats]) -> None:
        for layer, one in zip(model.layers, stats, strict=True):
            fold(layer, model.shape, one, **options)

    return apply


def no_data(fold: Callable[..., object], **options: object) -> Callable[[Model, list[Stats]], None]:
    def apply(model: Model, stats: list[Stats]) -> None:
        for layer, one in zip(model.layers, stats, strict=True):
            fold(layer, model.shape, stats=one, **options)

    return apply


def rotated(model: Model, stats: list[Stats]) -> None:
    turn = rotation(model.shape)
    for layer in model.layers:
        rotate_layer(layer, model.shape, turn)
    rotate_outer(model.outer, turn)


def injected(model: Model, stats: list[Stats]) -> None:
    for layer in model.layers:
        inject_outliers(layer, model.shape, CHANNELS, 50.0)
    inject_outer_outliers(model.outer, model.shape, CHANNELS, 50.0)


def permuted(model: Model, stats: list[Stats]) -> None:
    order_D = torch.randperm(model.shape.hidden, generator=torch.Generator().manual_seed(2))
    for layer, one in zip(model.layers, stats, strict=True):
        permute_layer(layer, order_D, one)
    permute_outer(model.outer, order_D)


GROUP = 2  # divides every size here
WEIGHTS = Objective(lambda name, w: group_round(w, GROUP, 3.5))
ROWS = Objective(lambda name, w: group_round(w, GROUP, 3.5), lambda x: row_round(x, 15))
FOLDS = {
    "smooth": each_layer(smooth, alpha=0.6, pairs=tuple(PAIRS)),
    "qoq down": each_layer(smooth, alpha=0.1, beta=0.9, pairs=("down",)),
    "awq": each_layer(awq, objective=WEIGHTS, grid=4),
    "awq plain": each_layer(awq, objective=WEIGHTS, grid=4, kind="plain", pairs=("qkv", "down")),
    "awq with rows": each_layer(awq, objective=ROWS, grid=4, kind="smooth"),
    "smooth attention": each_layer(smooth_attention, alpha=0.5),
    "search attention": each_layer(search_attention, quantize=lambda k: row_round(k, 7), grid=4),
    "keys before rope": each_layer(scale_keys_for_cache, top_k=0),
    "equalize": no_data(equalize, pairs={"qkv": 0.1, "gate_up": 0.0096, "o": None, "down": 0.015}),
    "equalize by max": no_data(equalize, pairs=dict.fromkeys(PAIRS), kind="max"),
    "values": no_data(scale_values),
    "reorder": each_layer(reorder),
}
WHOLE_MODEL = {"rotate": rotated, "inject": injected, "permute": permuted}


def changed(old: Model, new: Model) -> list[str]:
    before = old.tensors()
    return [n for n, t in new.tensors().items() if n not in before or not torch.equal(t, before[n])]


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("name", [*FOLDS, *WHOLE_MODEL])
def test_logits_stay(name: str, case: str) -> None:
    model = random_model(SHAPES[case])
    want, folded = model.run(IDS), model.copy()
    (FOLDS | WHOLE_MODEL)[name](folded, model.stats(IDS))
    assert changed(model, folded)
    assert want.std() > 0.5
    assert (folded.run(IDS) - want).abs().max() < 1e-9


@pytest.mark.parametrize("case", ["biases", "tied"])
@pytest.mark.parametrize("name", [*FOLDS, *WHOLE_MODEL])
def test_a_fold_of_one_side_only_is_seen(name: str, case: str) -> None:
    """Each tensor that a fold changed, put back alone, breaks the function that `test_logits_stay` compares."""
    model = random_model(SHAPES[case])
    want, folded = model.run(IDS), model.copy()
    (FOLDS | WHOLE_MODEL)[name](folded, model.stats(IDS))
    new, old = folded.tensors(), model.tensors()
    for tensor in changed(model, folded):
        if tensor not in old:
            del folded.outer[tensor]
        else:
            folded.put(tensor, old[tensor])
        assert (folded.run(IDS) - want).abs().max() > 1e-6, tensor
        folded.put(tensor, new[tensor])
    assert (folded.run(IDS) - want).abs().max() < 1e-9


def assert_same(got: object, want: object, where: str) -> None:
    assert (got is None) == (want is None), where
    if isinstance(want, Tensor):
        scale = want.abs().max().clamp_min(1e-3)
        assert (got - want).abs().max() < 1e-9 * scale, where
    else:
        assert got == want, where


@pytest.mark.parametrize("case", ["gqa", "biases"])
@pytest.mark.parametrize("name", [*FOLDS, "permute"])
def test_statistics_follow_the_fold(name: str, case: str) -> None:
    model = random_model(SHAPES[case])
    stats = model.stats(IDS)
    (FOLDS | WHOLE_MODEL)[name](model, stats)
    for i, (got, want) in enumerate(zip(stats, model.stats(IDS), strict=True)):
        for linear, inputs in want.inputs.items():
            for field in ("low_K", "high_K", "abssum_K", "rows", "hessian_KK", "sample_TK"):
                assert_same(
                    getattr(got.inputs[linear], field), getattr(inputs, field), f"{i}.{linear}.{field}"
                )
        for field in ("pair_GI", "before_GK", "after_GK", "value_GK", "query_gram_GKK", "keys_TGK"):
            assert_same(getattr(got.heads, field), getattr(want.heads, field), f"{i}.heads.{field}")


@pytest.mark.parametrize("name", [*FOLDS, *WHOLE_MODEL])
def test_logits_of_the_demo_model_stay(name: str) -> None:
    """Trained weights, stored in fp16, with a tied head."""
    source = Source(ROOT / "examples/demo")
    layers = [source.layer(i, torch.float64) for i in range(source.shape.layers)]
    model = Model(source.shape, layers, source.outer(torch.float64))
    ids = token_ids(2, 24, source.shape.vocab)
    want = model.run(ids)
    (FOLDS | WHOLE_MODEL)[name](model, model.stats(ids))
    assert (model.run(ids) - want).abs().max() < 1e-9


def test_folds_can_follow_each_other() -> None:
    model = random_model(SHAPES["biases"])
    want = model.run(IDS)
    for fold in WHOLE_MODEL.values():
        fold(model, model.stats(IDS))
    stats = model.stats(IDS)
    for fold in FOLDS.values():
        fold(model, stats)
    assert (model.run(IDS) - want).abs().max() < 1e-9


class Divided(Hooks):
    """What the engine does with channel_GK: keys divided, queries multiplied, after rotation."""

    def __init__(self, channel_GK: Tensor, heads_per_kv: int) -> None:
        self.channel_GK, self.times_HK = channel_GK, channel_GK.repeat_interleave(heads_per_kv, 0)

    def query(self, q_BTHK: Tensor) -> Tensor:
        return q_BTHK * self.times_HK

    def kv(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        return k_BTGK / self.channel_GK, v_BTGK


@pytest.mark.parametrize("case", SHAPES)
def test_scales_after_rope_leave_the_logits(case: str) -> None:
    model = random_model(SHAPES[case])
    want, shape = model.run(IDS), model.shape
    channels = [
        scale_keys_for_cache(layer, shape, one, top_k=3)
        for layer, one in zip(model.layers, model.stats(IDS), strict=True)
    ]
    hooks = [Divided(c, shape.heads_per_kv) for c in channels]
    assert (model.run(IDS, lambda i: hooks[i]) - want).abs().max() < 1e-9
    assert all(bool((c != 1).any(1).all()) for c in channels)


def test_tied_heads_become_matrices_only_where_they_must() -> None:
    model = random_model(SHAPES["tied"])
    permuted(model, model.stats(IDS))
    assert HEAD not in model.outer
    rotated(model, [])
    assert HEAD in model.outer
    plain = random_model(SHAPES["tied"])
    plain.outer["model.norm.weight"].fill_(1)
    want = plain.run(IDS)
    rotated(plain, [])
    assert HEAD not in plain.outer
    assert (plain.run(IDS) - want).abs().max() < 1e-9


def store_norms(model: Model, stored: torch.dtype) -> None:
    for layer in model.layers:
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            layer[norm] = layer[norm].to(stored).double()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["smooth", "awq", "equalize"])
def test_norms_survive_the_type_they_are_stored_in(name: str, stored: torch.dtype) -> None:
    """Scales are bent so that the norm can be stored exactly: rounded, it still undoes them."""
    model = random_model(SHAPES["gqa"])
    folds = {
        "smooth": each_layer(smooth, stored=stored),
        "awq": each_layer(awq, objective=WEIGHTS, grid=2, pairs=("qkv", "gate_up"), stored=stored),
        "equalize": no_data(equalize, pairs={"qkv": 0.1, "gate_up": 0.0096}, stored=stored),
    }
    store_norms(model, stored)
    want, free = model.run(IDS), model.copy()
    each_layer(smooth)(free, free.stats(IDS))
    folds[name](model, model.stats(IDS))
    store_norms(model, stored)
    store_norms(free, stored)
    assert (model.run(IDS) - want).abs().max() < 1e-9
    assert (free.run(IDS) - want).abs().max() > 1e-4
