"""What a worker needs of a GPU beside its weights and its share of the pool: a bound, from the shape of the model alone.

The pool is planned before anything has run, so the bound has to hold for the largest step there can be; once a worker
has warmed up and captured its graphs it says beside the bound what it really holds.  No torch: the agent plans pools.
"""

from pathlib import Path
from typing import NamedTuple

from kernels.kv_layout import FLOAT_BYTES, SCRATCH_BYTES, SPLIT_TOKENS, wide_tokens
from minserve.resolve import ResolvedModel

GiB, MiB = 1 << 30, 1 << 20
CONTEXT_BYTES = 768 * MiB  # CUDA's context, the kernels' code, workspaces of the libraries
HEAD_ROWS = 512  # rows of a prompt whose logits are held at once: 512 x 128k fp32 = 256 MiB
# of a logit: in 16 bit and in fp32, a copy that biases change, one for log probabilities, and those
LOGIT_BYTES = 18
DECODE_ITEMS = 8 * 160  # pieces of keys that fill a GPU at once, times KV heads: see kv_work.full_grid
# batch sizes that have a graph
SMALL_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
LARGE_STEP = 32
MOST_ROWS = 512  # larger steps keep a GPU busy for longer than a host takes to launch them
TABLE_ENTRIES = 1 << 18  # of a block table: 1 MiB to copy in a step
GRAPH_BYTES = 8 * MiB  # the driver's own, of one graph


class Workspace(NamedTuple):
    """Bytes.  `steps`: activations and logits of the largest step; `scratch`: keys and values that prefill dequantizes;
    `tables`: rotary tables and token history; `graphs`: a pool of their own, and what each keeps."""

    context: int
    steps: int
    scratch: int
    tables: int
    graphs: int

    @property
    def torch_bytes(self) -> int:
        """All that torch's allocator hands out."""
        return self.total - self.context

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value / GiB:.2f}" for name, value in zip(self._fields, self, strict=True))


def batch_sizes(max_running: int) -> list[int]:
    most = min(max_running, MOST_ROWS)
    sizes = [n for n in SMALL_BATCHES if n < most]
    return [*sizes, *range(SMALL_BATCHES[-1] + LARGE_STEP, most, LARGE_STEP), most]


def weight_bytes(r: ResolvedModel) -> int:
    """As large as the files: no scheme that is made at load takes more."""
    return sum(f.stat().st_size for f in Path(r.entry.path).glob("*.safetensors"))


def workspace(r: ResolvedModel) -> Workspace:
    c, entry, width = r.config, r.entry, FLOAT_BYTES[r.dtype]
    rows = entry.max_num_seqs
    head = max(rows, HEAD_ROWS) * c.vocab_size * LOGIT_BYTES
    # a matrix in codes that was 4 bit, for steps of many rows; quantized at load, one and its fp32 copies
    wide = 2 * c.intermediate_size * c.hidden_size
    load = 10 * max(wide, c.vocab_size * c.hidden_size if entry.lm_head != "auto" else 0)
    steps = max(activations(r, entry.max_num_batched_tokens) + wide, head, load)
    history = 4 * 2 * rows * (r.max_model_len + 1)
    tables = history + 2 * 4 * r.max_model_len * c.head_dim
    sizes = batch_sizes(rows) if entry.cuda_graphs and not entry.deterministic else []
    kept = sum(2 * n * c.hidden_size * width + GRAPH_BYTES + 2 * 4 * TABLE_ENTRIES for n in sizes)
    graphs = kept + activations(r, max(sizes, default=0))
    # the allocator's blocks are rounded up, and not every hole fits what comes next
    steps, graphs = steps + steps // 8, graphs + graphs // 8
    return Workspace(CONTEXT_BYTES, steps, prefill_scratch(r), tables, graphs)


def activations(r: ResolvedModel, tokens: int) -> int:
    """Of a step of so many rows, up to the logits: all tensors of a layer at once, and the parts of attention."""
    c, width = r.config, FLOAT_BYTES[r.dtype]
    row = 4 * c.hidden_size + 3 * c.intermediate_size + 3 * c.q_size + 2 * c.kv_size
    if r.entry.fp8_queries:  # codes, and what they stand for as float32 and as queries
        row += 4 * c.q_size
    slots = DECODE_ITEMS // c.num_kv_heads * wide_tokens(c.head_dim, c.num_heads // c.num_kv_heads)
    if r.entry.deterministic:
        slots = tokens * -(-r.max_model_len // SPLIT_TOKENS)
    return tokens * (width * row + 64) + (tokens and (slots + tokens) * c.num_heads * (c.head_dim + 2) * 4)


def prefill_scratch(r: ResolvedModel) -> int:
    """A layer's keys and values of all chunks of a step, in the model's type or, for prefill in fp8, in that; single
    tokens have none, and what is fp8 already."""
    layout, entry = r.layout, r.entry
    in_fp8 = entry.fp8_prefill and {x.fmt for x in r.layouts} <= {"fp8", "int4"}
    if not layout.quantized or entry.deterministic or (in_fp8 and layout.fmt == "fp8"):
        return 0
    token = 2 * layout.num_kv_heads * layout.head_dim * FLOAT_BYTES[r.dtype]
    if in_fp8:
        token = layout.with_format("fp8").block_bytes // layout.block_tokens
    most = entry.max_num_seqs * layout.blocks_for(r.max_model_len) * layout.block_tokens
    return min(SCRATCH_BYTES * FLOAT_BYTES[r.dtype] // 2, most * token)
