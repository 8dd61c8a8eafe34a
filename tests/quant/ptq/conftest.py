"""A tiny model with its calibration text, for the tests of the command."""

from pathlib import Path

import pytest
import torch

from tests.tiny import write_llama, write_tokenizer

WORDS = [
    "the",
    "rain",
    "in",
    "spain",
    "falls",
    "on",
    "a",
    "plain",
    "roof",
    "and",
    "some",
    "trees",
    "near",
    "there",
    "were",
    "told",
    "to",
    "run",
    "home",
]


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups of 128 divide it; biases, and two query heads to a KV head."""
    folder = write_llama(
        tmp_path_factory.mktemp("ptq") / "plain",
        seed=6,
        hidden_size=128,
        intermediate_size=256,
        attention_bias=True,
        num_attention_heads=4,
        head_dim=32,
    )
    return write_tokenizer(folder)


@pytest.fixture(scope="session")
def text(plain: Path) -> Path:
    g = torch.Generator().manual_seed(1)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (900,), generator=g).tolist()]
    path = plain.parent / "calib.txt"
    path.write_text("".join(w + ("\n" if i % 9 == 8 else " ") for i, w in enumerate(words)))
    return path
