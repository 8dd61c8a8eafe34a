"""Trains the demo model on the text of demo_text.py and writes examples/demo, on one CPU thread.

    python -m examples.train_demo --out examples/demo
    python -m examples.train_demo --size large --steps 300 --out models/demo-large    # the ground of bench.quality

Prints the loss curve.  The folder is rewritten every --save-every steps, so that a usable model exists at any
time; --steps sets the length, the learning rate falls to zero at the end.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from string import ascii_lowercase

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from examples import demo_words
from examples.demo_text import draw_chat, draw_plain

VOCAB = 1536
WINDOW = 1024
SPECIAL = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
BEGIN, END = 0, 1
WORD_LISTS = ("ANIMALS", "THINGS", "PLACES", "COLORS", "TRAITS", "FOODS", "TOOLS", "HOLES", "DAYS", "MONTHS")
PLAIN_SHARE = 0.05
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['content'] is string %}{{ m['content'] | trim }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SIZES = {
    "small": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "large": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
Row = tuple[list[int], list[float]]  # token ids, and what each weighs in the loss


def words_and_texts(rng: Random, documents: int) -> Iterator[str]:
    """What the tokenizer learns from: our word lists, so that rare names stay whole, and sampled text."""
    names = [name for name, _ in demo_words.NAMES]
    lists = [
        *demo_words.CAPITALS,
        *demo_words.OPPOSITES,
        *(getattr(demo_words, name) for name in WORD_LISTS),
        names,
    ]
    for word in sorted(
        {w for listed in lists for phrase in listed for w in phrase.split()} | {*ascii_lowercase}
    ):
        yield from [f" {word}"] * 100
    for name in names:
        yield from [name] * 100
    for _ in range(documents):
        yield draw_plain(rng)
        yield from (m["content"] for m in draw_chat(rng))


def train_tokenizer(rng: Random, documents: int = 5_000) -> Tokenizer:
    """Byte-level BPE with every digit a token of its own; any UTF-8 text has an encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words_and_texts(rng, documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BEGIN]} $A",
        pair=f"{SPECIAL[BEGIN]} $A $B",
        special_tokens=[(SPECIAL[BEGIN], BEGIN)],
    )
    assert tokenizer.get_vocab_size() == VOCAB, tokenizer.get_vocab_size()
    return tokenizer


def model_config(size: str) -> LlamaConfig:
    """1.4 M parameters, or 6.7 M; every width a multiple of 128, so that the quantizers' groups divide it."""
    return LlamaConfig(
        vocab_size=VOCAB,
        **SIZES[size],
        max_position_embeddings=WINDOW,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=END,
        initializer_range=0.04,
    )


def weights(body: list[int]) -> list[float]:
    """A token of a long answer counts less: else stories, whose words are mostly chance, drown the sums."""
    return [len(body) ** -0.5] * len(body)


class Rows:
    """Endless rows of `length` tokens, each packed with whole documents from its start (the last is cut)."""

    def __init__(self, tokenizer: Tokenizer, rng: Random) -> None:
        self.tokenizer, self.rng = tokenizer, rng
        self.roles = {name: SPECIAL.index(f"<|{name}|>") for name in ("system", "user", "assistant")}

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def document(self) -> Row:
        if self.rng.random() < PLAIN_SHARE:
            # one in ten without the begin token: not every client sends it
            start = [] if self.rng.random() < 0.1 else [BEGIN]
            body = [*self._encode(draw_plain(self.rng)), END]
            return start + body, [0.0] * len(start) + weights(body)
        ids, weighed = [BEGIN], [0.0]
        for message in draw_chat(self.rng):
            body = [*self._encode(message["content"]), END]
            ids += [self.roles[message["role"]], *body]
            weighed += [0.0, *(weights(body) if message["role"] == "assistant" else [0.0] * len(body))]
        return ids, weighed

    def batch(self, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and the targets' weights, each [rows, length]."""
        ids_RT, weights_RT = [], []
        for _ in range(rows):
            ids: list[int] = []
            weighed: list[float] = []
            while len(ids) < length + 1:
                more, weigh = self.document()
                ids += more
                weighed += weigh
            ids_RT.append(ids[: length + 1])
            weights_RT.append(weighed[: length + 1])
        ids_t, weights_t = torch.tensor(ids_RT), torch.tensor(weights_RT)
        return ids_t[:, :-1], ids_t[:, 1:], weights_t[:, 1:]


def batches(rows: Rows, tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Mostly rows of 256; one step in sixteen of the whole window, so that long prompts are no news."""
    while True:
        for i in range(16):
            length = WINDOW if i == 15 else 256
            yield rows.batch(max(tokens // length, 1), length)


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """Warm-up over 50 steps, then flat, then a linear fall to zero over the last half."""
    return min((step + 1) / 50, 1.0, (steps - step) / (0.5 * steps))


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config).to(torch.float16)
    half.load_state_dict(model.state_dict())
    half.config.dtype = torch.float16
    half.generation_config.eos_token_id, half.generation_config.bos_token_id = END, BEGIN
    half.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    tokens = {"bos_token": SPECIAL[BEGIN], "eos_token": SPECIAL[END], "pad_token": SPECIAL[END]}
    extra = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": WINDOW,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(
        json.dumps({**tokens, **extra, "chat_template": CHAT_TEMPLATE}, indent=2) + "\n"
    )


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(Random(args.seed))
    model = LlamaForCausalLM(model_config(args.size))
    rows = Rows(tokenizer, Random(args.seed + 1))
    opts, start, mean = optimizers(model, args.lr), time.monotonic(), 0.0
    sys.stdout.write(f"{sum(p.numel() for p in model.parameters()):,} parameters, seed {args.seed}\n")
    for step, (x_RT, y_RT, w_RT) in zip(range(args.steps), batches(rows, args.tokens), strict=False):
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.lr * rate(step, args.steps)
        counts_RT = w_RT > 0  # the head is a fifth of the work: only rows that count go through it
        x_TD = model.model(x_RT, use_cache=False).last_hidden_state[counts_RT]
        loss_T = F.cross_entropy(model.lm_head(x_TD), y_RT[counts_RT], reduction="none")
        loss = (loss_T * w_RT[counts_RT]).sum() / w_RT.sum()
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        mean += (loss.item() - mean) / (step % args.log_every + 1)
        if (step + 1) % args.log_every == 0:
            sys.stdout.write(f"step {step + 1:5d}  loss {mean:.4f}  {time.monotonic() - start:6.0f} s\n")
            sys.stdout.flush()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(model, tokenizer, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("examples/demo"))
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=2100)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a step")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=200)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
