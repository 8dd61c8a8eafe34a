"""Calibration text as windows of token ids [S, T]: from a text file by the model's tokenizer, or from an array of ids.

Windows are spread evenly over the text; where the tokenizer begins a text with special tokens, every window does.  The
last windows are held back: what is judged has not been calibrated on.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from torch import Tensor

MAX_TEXT_BYTES = 4 << 30
PIECE = 1 << 20  # characters
JUDGED_SHARE = 5  # at most one window in five is held back
SHORTEST = 2  # tokens of a window: the first is predicted from nothing


class Windows(NamedTuple):
    """`judged_ST` is None where the text has too few windows to hold any back."""

    calib_ST: Tensor
    judged_ST: Tensor | None

    def described(self) -> str:
        """How much there is to calibrate and to judge on."""
        held = 0 if self.judged_ST is None else len(self.judged_ST)
        (count, length) = self.calib_ST.shape
        return f"{count} windows of {length} tokens ({count * length}) to calibrate on, {held} held back to judge on"

    def lacking(self, samples: int, judged: int) -> list[str]:
        """What there is less of than was asked for, a line each."""
        held = 0 if self.judged_ST is None else len(self.judged_ST)
        lines = []
        if len(self.calib_ST) < samples:
            lines.append(
                f"the text has {len(self.calib_ST)} windows to calibrate on, of {samples} asked for (--samples)"
            )
        if held < judged:
            told = "no KL and no perplexity will be reported" if not held else "fewer are a rougher judgement"
            lines.append(f"{held} windows are held back, of {judged} asked for (--judged): {told}")
        return lines


def from_text(path: Path, model: Path, length: int) -> Tensor:
    """All windows of `length` tokens of a text file."""
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise ValueError(f"{path} holds more than {MAX_TEXT_BYTES} bytes of text")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error
    file = model / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{model} has no tokenizer.json to read {path} with: give token ids by --calib-tokens"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the only type that tokenizers raises
        raise ValueError(f"{file} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    start = tokenizer.encode("").ids
    # a piece at a time keeps the tokenizer's memory small; what begins a text is put before every window instead
    pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    encoded = tokenizer.encode_batch(pieces, add_special_tokens=False)
    ids_N = torch.tensor([i for one in encoded for i in one.ids])
    return _cut(ids_N, start, length, path)


def from_array(path: Path, length: int, vocab: int) -> Tensor:
    """The rows of an [S, T] array of ids (.npy), cut to `length`, or windows of a one-dimensional one."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a .npy array: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise ValueError(
            f"{path} must hold integers [S, T] or [N], got {getattr(array, 'dtype', type(array))}"
        )
    if not array.size or array.min() < 0 or array.max() >= vocab:
        raise ValueError(f"{path} must hold token ids in [0, {vocab}), got {array.size} numbers")
    ids = torch.from_numpy(array.astype(np.int64))
    if ids.ndim == 2 and ids.shape[1] < SHORTEST:
        raise ValueError(
            f"{path} must hold windows of at least {SHORTEST} tokens, [S, T], got {list(array.shape)}"
        )
    return ids[:, :length] if ids.ndim == 2 else _cut(ids, [], length, path)


def _cut(ids_N: Tensor, start: list[int], length: int, path: Path) -> Tensor:
    body = length - len(start)
    count = len(ids_N) // body if body > 0 else 0
    if not count:
        raise ValueError(f"{path} has {len(ids_N)} tokens, too few for one window of {length}")
    windows_ST = ids_N[: count * body].view(count, body)
    return torch.cat((torch.tensor(start, dtype=ids_N.dtype).expand(count, -1), windows_ST), dim=1)


def split(windows_ST: Tensor, samples: int, judged: int) -> Windows:
    """`samples` windows to calibrate on, evenly spread, and up to `judged` from the end."""
    held = min(judged, len(windows_ST) // JUDGED_SHARE)
    rest_ST = windows_ST[: len(windows_ST) - held]
    at_S = torch.linspace(0, len(rest_ST) - 1, min(samples, len(rest_ST))).round().long()
    return Windows(rest_ST[at_S], windows_ST[len(windows_ST) - held :] if held else None)
