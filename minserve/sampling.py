"""SamplingParams: what a caller may ask of the sampler, validated at construction.

Field names and defaults are vLLM's.  A bad value raises ValueError naming the field, the value and the choices; the
server maps that to a 400.  Knows nothing of tensors.
"""

import math
from dataclasses import dataclass, field
from typing import Any

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_LOGIT_BIAS = 300
FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize")
INT64 = range(-(2**63), 2**63)


def _number(name: str, value: Any, low: float, high: float, *, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if value > high or value < low or (low_open and value == low):
        left = "(" if low_open else "["
        raise ValueError(f"{name} must be in {left}{low}, {high}], got {value!r}")


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled and when it stops.

    `temperature` 0 means greedy.  `top_k` 0 or -1 means off.  `seed` makes the request reproducible whatever else
    runs beside it.  `logprobs` asks for the log probability of each sampled token and of that many of the most
    likely ones; `prompt_logprobs` the same for the prompt.  `max_tokens` None means up to the model's window.
    Presence and frequency penalties count output tokens only, the repetition penalty prompt and output.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = field(default=True)

    def __post_init__(self) -> None:
        # lists and a bare stop string are accepted from callers, tuples are kept
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, value in (("stop", stop), ("stop_token_ids", self.stop_token_ids)):
            if value is not None and not isinstance(value, list | tuple | set | frozenset):
                raise ValueError(f"{name} must be a list, got {value!r:.80}")
            object.__setattr__(self, name, tuple(value or ()))
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r:.80}")
        self._check_lengths()
        self._check_numbers()
        self._check_stops()

    def _check_lengths(self) -> None:
        _integer("n", self.n, 1, 16)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0, 2**31)
        _integer("min_tokens", self.min_tokens, 0, 2**31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}"
            )
        if self.seed is not None:
            _integer("seed", self.seed, INT64.start, INT64.stop - 1)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _integer(name, value, 0, MAX_LOGPROBS)

    def _check_numbers(self) -> None:
        _number("temperature", self.temperature, 0, 2)
        _number("top_p", self.top_p, 0, 1, low_open=True)
        _integer("top_k", self.top_k, -1, 2**31)
        _number("min_p", self.min_p, 0, 1)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("repetition_penalty", self.repetition_penalty, 0, 1e6, low_open=True)

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOPS:
            raise ValueError(f"stop may hold at most {MAX_STOPS} strings, got {len(self.stop)}")
        for s in self.stop:
            if not isinstance(s, str) or not s:
                raise ValueError(f"stop must hold non-empty strings, got {s!r:.80}")
        if sum(map(len, self.stop)) > 1024:
            raise ValueError(f"stop strings may hold 1024 characters in all, got {sum(map(len, self.stop))}")
        for t in self.stop_token_ids:
            _integer("stop_token_ids", t, 0, 2**31)
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, dict):
            raise ValueError(f"logit_bias must be a dict of token ids, got {self.logit_bias!r:.80}")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise ValueError(
                f"logit_bias may hold at most {MAX_LOGIT_BIAS} entries, got {len(self.logit_bias)}"
            )
        for token, bias in self.logit_bias.items():
            _integer("logit_bias token id", token, 0, 2**31)
            _number(f"logit_bias of token {token}", bias, -100, 100)

    @property
    def greedy(self) -> bool:
        # logits / 1e-5 already puts all mass on the argmax; smaller values would only overflow
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)
