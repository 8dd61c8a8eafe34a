"""Tiny Llama checkpoints and tokenizers, written by transformers and tokenizers into a folder.

Weights are random but well spread (unlike the 0.02 of a fresh model), so that logits differ between tokens, norms
are not one and biases not zero: a path that drops any of them is seen.  The last two token ids are BOS and EOS.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LETTERS = "etaoinshrdlucmfwypvbgkqjxz"
BOS, EOS = "<|begin|>", "<|end|>"
DEFAULTS: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


def write_llama(
    path: Path, seed: int = 0, *, dtype: str = "float32", max_shard_size: str = "50GB", **overrides: Any
) -> Path:
    """Writes a random Llama of `DEFAULTS` with `overrides` (transformers' LlamaConfig keys); returns `path`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    values = DEFAULTS | overrides
    values.setdefault("bos_token_id", values["vocab_size"] - 2)
    values.setdefault("eos_token_id", values["vocab_size"] - 1)
    model = LlamaForCausalLM(LlamaConfig(**values))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embed_tokens" not in name:
                p.normal_(0, 1.2 / p.shape[1] ** 0.5, generator=g)
            elif name.endswith(".bias"):
                p.normal_(0, 0.3, generator=g)
            elif "norm" in name:
                p.uniform_(0.7, 1.3, generator=g)
            else:
                p.normal_(0, 1.0, generator=g)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
    return Path(path)


def write_tokenizer(path: Path, vocab_size: int = DEFAULTS["vocab_size"]) -> Path:
    """Writes a byte-level BPE tokenizer of exactly `vocab_size` ids with a chat template; returns `path`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    num_merges = vocab_size - 256 - 2
    if num_merges < 0:
        raise ValueError(f"vocab_size must be at least 258 (256 bytes, BOS, EOS), got {vocab_size}")
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = list(itertools.islice(_merges(), num_merges))
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (BOS, EOS)])
    assert tokenizer.get_vocab_size() == vocab_size
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return path


def _merges() -> Iterator[tuple[str, str]]:
    # pairs, then triples and so on over the letters; "Ġ" is the byte-level spelling of a leading space
    heads = ["Ġ", *LETTERS]
    while True:
        pairs = [(head, letter) for letter in LETTERS for head in heads]
        yield from pairs
        heads = [left + right for left, right in pairs]
