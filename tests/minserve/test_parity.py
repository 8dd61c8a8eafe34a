"""Token equality with transformers, and of ours with itself: batched, chunked, preempted, overlapped.

Greedy tokens are checked by forcing: transformers reads prompt + our tokens once, and its argmax at every position
must be our next token.  That is the same statement as comparing two greedy runs, for an eighth of the time; a few
configs run `generate` itself.  A token may differ only where transformers' own top two are closer than TIE.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minserve import LLM, SamplingParams
from minserve.llm import kl_divergence
from tests.tiny import write_llama

TIE = 1e-5
NEW_TOKENS = 64
PROMPT_LENGTHS = (1, 2, 7, 15, 16, 17, 33, 50)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)

ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-mscale": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128,
        "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.9,
    },
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256,
        "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)],
    },
}  # fmt: skip
HEADS: dict[str, dict[str, int]] = {
    "gqa2": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
    "mqa": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16},
    "gqa3": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 48},
    "wide": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 80},
    "odd": {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 24, "hidden_size": 40},
    "narrow": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
}
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "deep": {"num_hidden_layers": 5, "intermediate_size": 40, "vocab_size": 1031},
}


def _configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every rope type with the plain heads, then heads x extras, with the rope types taken in turn."""
    for name, rope in ROPE.items():
        yield name, {"rope_parameters": rope, **HEADS["gqa2"]}
    ropes = [n for n in ROPE if n != "longrope"]  # its factor lists are for head_dim 16
    i = 0
    for head_name, heads in HEADS.items():
        for extra_name, extra in EXTRAS.items():
            rope = ropes[i % len(ropes)]
            i += 1
            yield f"{head_name}-{extra_name}-{rope}", {"rope_parameters": ROPE[rope], **heads, **extra}


CONFIGS = dict(_configs())


@dataclass
class Tally:
    """Printed at the end of the module: how near the ties were, and how many were used."""

    worst_logit: float = 0.0
    ties: int = 0
    tokens: int = 0
    rows: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    t = Tally()
    yield t
    print(
        f"\n{len(CONFIGS)} configs: worst logit difference {t.worst_logit:.1e}, {t.ties} ties in {t.tokens} tokens"
    )


def prompts(vocab: int, lengths: tuple[int, ...] = PROMPT_LENGTHS, seed: int = 0) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=g).tolist() for n in lengths]


def load_hf(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def check_greedy(hf: Any, prompt: list[int], ours: list[int]) -> int:
    """Number of ties used; raises where our token is not transformers' argmax and the gap is not a tie."""
    logits = hf(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
    ties = 0
    for at, (row, token) in enumerate(zip(logits, ours, strict=True)):
        if row.argmax().item() != token:
            gap = (row.max() - row[token]).item()
            assert gap < TIE, f"token {at}: ours {token}, transformers {row.argmax().item()}, gap {gap:.1e}"
            ties += 1
    return ties


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_equal_transformers(name: str, tmp_path: Path, tally: Tally) -> None:
    path = write_llama(tmp_path, seed=len(name), **CONFIGS[name])
    hf = load_hf(path)
    vocab = hf.config.vocab_size
    with LLM(path, dtype="fp32", device="cpu", pool_bytes=16 << 20) as llm:
        ids = prompts(vocab, (97,))[0]
        want = hf(torch.tensor([ids])).logits[0].detach()
        difference = ((llm.logits(ids) - want).abs().max() / want.abs().max()).item()
        assert difference <= 1e-4
        asked = prompts(vocab)
        outputs = llm.generate(asked, GREEDY)
    tally.worst_logit = max(tally.worst_logit, difference)
    for prompt, out in zip(asked, outputs, strict=True):
        tokens = out.outputs[0].token_ids
        assert len(tokens) == NEW_TOKENS
        tally.ties += check_greedy(hf, prompt, tokens)
        tally.tokens += len(tokens)


def test_generate_of_transformers_says_the_same(tmp_path: Path) -> None:
    path = write_llama(tmp_path, seed=3, **CONFIGS["llama3"])
    hf = load_hf(path)
    with LLM(path, dtype="fp32", device="cpu", pool_bytes=8 << 20) as llm:
        for prompt, out in zip(asked := prompts(300, seed=4), llm.generate(asked, GREEDY), strict=True):
            want = hf.generate(
                torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
            )[0, len(prompt) :].tolist()
            # min_new_tokens bans EOS, which ours may pick: compare up to there
            eos = hf.config.eos_token_id
            ours = out.outputs[0].token_ids
            upto = ours.index(eos) if eos in ours else NEW_TOKENS
            assert ours[:upto] == want[:upto]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_beyond_the_trained_length_are_those_of_max_model_len(kind: str, tmp_path: Path) -> None:
    rope = dict(ROPE[kind])
    if kind == "longrope":
        rope["original_max_position_embeddings"] = 64
    path = write_llama(
        tmp_path, max_position_embeddings=256 if kind == "longrope" else 128, rope_parameters=rope
    )
    hf = load_hf(path)
    ids = prompts(300, (200,))[0]
    want = hf(torch.tensor([ids])).logits[0].detach()
    with LLM(path, dtype="fp32", device="cpu", pool_bytes=8 << 20, max_model_len=200) as llm:
        assert ((llm.logits(ids) - want).abs().max() / want.abs().max()).item() <= 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model"), seed=11, num_hidden_layers=3)


def tokens_of(
    path: Path, asked: list[list[int]], *, one_by_one: bool = False, **keys: Any
) -> list[list[int]]:
    with LLM(path, device="cpu", **({"dtype": "fp32", "pool_bytes": 8 << 20} | keys)) as llm:
        calls = [[p] for p in asked] if one_by_one else [asked]
        return [o.outputs[0].token_ids for call in calls for o in llm.generate(call, GREEDY)]


VARIANTS: dict[str, dict[str, Any]] = {
    "alone": {"one_by_one": True},
    "chunks of 16": {"max_num_batched_tokens": 16, "max_num_seqs": 8},
    "two at a time": {"max_num_seqs": 2},
    "overlap": {"overlap": True},
}


@pytest.mark.parametrize("deterministic", [False, True], ids=["fp32", "deterministic-bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_do_not_depend_on_how_requests_are_batched(
    variant: str, deterministic: bool, model: Path
) -> None:
    asked = prompts(300, seed=1)
    keys: dict[str, Any] = {"deterministic": True, "dtype": "bf16"} if deterministic else {}
    assert tokens_of(model, asked, **keys, **VARIANTS[variant]) == tokens_of(model, asked, **keys)


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_tokens_do_not_depend_on_batches_on_two_threads_either(model: Path) -> None:
    asked, keys = prompts(300, seed=1), {"deterministic": True, "dtype": "bf16"}
    assert tokens_of(model, asked, **keys, **VARIANTS["chunks of 16"]) == tokens_of(model, asked, **keys)


def hog_all_but(llm: LLM, tokens: int) -> None:
    """Leases sets of the pool away, as another model would, until `tokens` fit in the rest."""
    sets = llm._local.sets
    keep = -(-tokens // sets.shape.set_tokens)
    while llm._local.pool.table.counts().free > keep * sets.shape.layers:
        assert sets.lease(urgent=True) is not None


@pytest.mark.parametrize(
    ("kv_dtype", "overlap"),
    [("fp32", False), ("fp32", True), ("int8", True), ("int4", False), ("fp8", False), ("int4z", True)],
)
def test_preempted_requests_give_the_same_tokens(kv_dtype: str, overlap: bool, model: Path) -> None:
    asked = prompts(300, (30, 40, 50, 60, 20, 10, 55, 45), seed=2)
    want = tokens_of(model, asked, kv_dtype=kv_dtype)
    with LLM(
        model,
        device="cpu",
        dtype="fp32",
        kv_dtype=kv_dtype,
        pool_bytes=8 << 20,
        max_model_len=128,
        overlap=overlap,
    ) as llm:
        hog_all_but(llm, tokens=300)  # room for three of the eight
        got = [o.outputs[0].token_ids for o in llm.generate(asked, GREEDY)]
        assert llm.engine.batcher.num_preemptions > 0, "the pool was not tight enough to preempt anything"
    assert got == want


# three times the KL(fp32 || this KV format) that this random model has: 1.4e-4 (bf16 weights too), 8.0e-4, 3.6e-5,
# 1.1e-2, 5.7e-3
KV_BOUND = {"bf16": 4.2e-4, "fp8": 2.4e-3, "int8": 1.1e-4, "int4": 3.3e-2, "int4z": 1.7e-2}


@pytest.mark.parametrize("fmt", KV_BOUND)
def test_kv_formats_stay_within_their_measured_bound(fmt: str, model: Path) -> None:
    ids = prompts(300, (200,), seed=5)[0]
    with LLM(model, device="cpu", dtype="fp32", pool_bytes=8 << 20) as llm:
        exact = llm.logits(ids)
    dtype = "bf16" if fmt == "bf16" else "fp32"
    with LLM(model, device="cpu", dtype=dtype, kv_dtype=fmt, pool_bytes=8 << 20) as llm:
        kl = kl_divergence(exact, llm.logits(ids))
    print(f"KL(fp32 || kv {fmt}) = {kl:.1e}")
    assert 0 < kl < KV_BOUND[fmt]
