"""StepPlan -> arrays: which tokens, where their keys go, which rows are sampled and how.

`RowTable` holds what a running request needs on the host: its block table, its place in the token history and its
sampling parameters.  Token ids live on the device, in the history: a decode reads the token that the step before it
wrote there, so a step can be planned and enqueued while the one before still runs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.launch import upload
from minserve.sampler import Penalty, SampleBatch, uniform
from minserve.sampling import SamplingParams
from sched.step import Chunk, StepPlan


class Join(NamedTuple):
    """A request that enters (or, after a preemption, re-enters) the runner: all tokens it has so far."""

    rid: int
    tokens: tuple[int, ...]
    prompt_tokens: int
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]


@dataclass(slots=True)
class Row:
    """Host state of one running request.  `length`: tokens in its history, the enqueued ones included."""

    rid: int
    index: int
    length: int
    num_blocks: int
    prompt_tokens: int
    params: SamplingParams
    seed: int
    stop_ids: Tensor
    bias: tuple[Tensor, Tensor] | None


class PromptRows(NamedTuple):
    """Rows `[first_row, first_row + num_rows)` of the step predict the prompt tokens from `position` on."""

    rid: int
    first_row: int
    num_rows: int
    position: int
    history_row: int
    num_top: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, host side.  B requests in row order (decodes, then chunks), T tokens, R sampled rows."""

    starts: list[int]
    counts: list[int]
    block_table_BN: NDArray[np.int32]
    history_index_T: NDArray[np.int64]
    sampled_rids: list[int]
    sampled_rows_R: list[int]
    write_index_R: list[int]
    sampling: SampleBatch
    prompt_rows: list[PromptRows]

    @property
    def single_tokens(self) -> bool:
        """One token of every request, and its row is sampled: a step that a CUDA graph can be for."""
        return (
            len(self.sampled_rows_R) == len(self.counts) == len(self.history_index_T) and not self.prompt_rows
        )


class RowTable:
    """Rows of the running requests.  `width` tokens fit in a row of the history, `max_blocks` in a block table."""

    def __init__(self, max_rows: int, width: int, max_blocks: int, device: torch.device) -> None:
        self.width = width
        self.device = device
        # one more than the rows hold: it stays 0, for rows of a step that only fill it up
        self.tokens = torch.zeros(max_rows * width + 1, dtype=torch.int32, device=device)
        self.zero_index = max_rows * width
        self.history = self.tokens[:-1].view(max_rows, width)
        self.max_blocks = max_blocks
        self._blocks = np.zeros((max_rows, max_blocks), dtype=np.int32)
        self._rows: dict[int, Row] = {}
        self._free = list(range(max_rows - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._rows)

    def drop(self, rids: tuple[int, ...]) -> None:
        """Forgets requests that left; one that never joined (aborted while waiting) is no error."""
        for rid in rids:
            row = self._rows.pop(rid, None)
            if row is not None:
                self._free.append(row.index)

    def join(self, j: Join) -> Row:
        assert j.rid not in self._rows, f"request {j.rid} already has row {self._rows[j.rid].index}"
        assert self._free, f"all {len(self._rows)} rows are taken"
        bias = None
        if j.params.logit_bias:
            ids, values = zip(*sorted(j.params.logit_bias.items()), strict=True)
            bias = (upload(torch.tensor(ids), self.device), upload(torch.tensor(values), self.device))
        stop_ids = upload(torch.tensor(j.stop_ids, dtype=torch.int64), self.device)
        row = Row(
            j.rid, self._free.pop(), len(j.tokens), 0, j.prompt_tokens, j.params, j.seed, stop_ids, bias
        )
        self._rows[j.rid] = row
        return row

    def grow(self, rid: int, blocks: tuple[int, ...]) -> None:
        row = self._rows[rid]
        self._blocks[row.index, row.num_blocks : row.num_blocks + len(blocks)] = blocks
        row.num_blocks += len(blocks)

    def patch(self, rid: int, index: int, block: int) -> None:
        """Entry `index` of its block table is this block from now on."""
        row = self._rows[rid]
        assert index < row.num_blocks, f"request {rid} has {row.num_blocks} blocks, {index} is to be patched"
        self._blocks[row.index, index] = block

    def inputs(self, plan: StepPlan) -> StepInputs:
        """The arrays of one step; moves the lengths of the sampled rows on by one."""
        rows = [self._rows[rid] for rid in plan.decode] + [self._rows[c.rid] for c in plan.chunks]
        starts = [row.length - 1 for row in rows[: len(plan.decode)]] + [c.start for c in plan.chunks]
        counts = [1] * len(plan.decode) + [c.count for c in plan.chunks]
        index = np.fromiter((row.index for row in rows), dtype=np.int64, count=len(rows))
        table = self._blocks[index, : max(row.num_blocks for row in rows)]
        count_B = np.asarray(counts, np.int64)
        ends = np.cumsum(count_B)
        first = index * self.width + np.asarray(starts, np.int64) - (ends - count_B)
        sampled = [
            i for i in range(len(rows)) if i < len(plan.decode) or plan.chunks[i - len(plan.decode)].samples
        ]
        prompt_rows = _prompt_rows(plan.chunks, rows[len(plan.decode) :], first_row=len(plan.decode))
        picked = [rows[i] for i in sampled]
        return StepInputs(
            starts=starts,
            counts=counts,
            block_table_BN=table,
            history_index_T=np.repeat(first, count_B) + np.arange(ends[-1], dtype=np.int64),
            sampled_rids=[row.rid for row in picked],
            sampled_rows_R=[int(ends[i]) - 1 for i in sampled],
            write_index_R=[rows[i].index * self.width + starts[i] + counts[i] for i in sampled],
            sampling=self._sampling(picked, [starts[i] + counts[i] for i in sampled]),
            prompt_rows=prompt_rows,
        )

    def _sampling(self, rows: list[Row], positions: list[int]) -> SampleBatch:
        """Sampling values of the picked rows, whose next token is to stand at `positions`."""
        params = [row.params for row in rows]
        batch = SampleBatch(
            temperature=[0.0 if p.greedy else p.temperature for p in params],
            top_k=[p.top_k for p in params],
            top_p=[p.top_p for p in params],
            min_p=[p.min_p for p in params],
            uniform=[
                0.0 if r.params.greedy else uniform(r.seed, at) for r, at in zip(rows, positions, strict=True)
            ],
            logprobs=[p.logprobs for p in params],
        )
        for i, (row, at) in enumerate(zip(rows, positions, strict=True)):
            row.length = at + 1
            p = row.params
            if row.bias is not None:
                batch.biases.append((i, *row.bias))
            if at - row.prompt_tokens < p.min_tokens and len(row.stop_ids):
                batch.banned.append((i, row.stop_ids))
            if p.has_penalties:
                # a view: the tokens are read when the step runs, after the step before has written its own
                tokens = self.history[row.index, :at]
                batch.penalties.append(
                    Penalty(
                        i,
                        tokens,
                        row.prompt_tokens,
                        p.presence_penalty,
                        p.frequency_penalty,
                        p.repetition_penalty,
                    )
                )
        return batch


def _prompt_rows(chunks: tuple[Chunk, ...], rows: list[Row], first_row: int) -> list[PromptRows]:
    """The rows whose logits prompt log probabilities need: position i predicts the prompt token i + 1."""
    out = []
    for c, row in zip(chunks, rows, strict=True):
        count = min(c.start + c.count, row.prompt_tokens - 1) - c.start
        if row.params.prompt_logprobs is not None and count > 0:
            out.append(
                PromptRows(c.rid, first_row, count, c.start + 1, row.index, row.params.prompt_logprobs)
            )
        first_row += c.count
    return out
