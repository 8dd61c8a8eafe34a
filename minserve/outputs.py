"""What `LLM.generate` returns, in vLLM's names: answers, their tokens, text and log probabilities."""

from dataclasses import dataclass

from minserve.engine import TokenEvent
from minserve.sampler import TokenLogprobs
from minserve.sampling import SamplingParams
from minserve.text import AnswerText, Tokenizer


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of one token at one position.  `rank` 1 is the most likely; `decoded_token` None without a tokenizer."""

    logprob: float
    rank: int
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """One of the n answers to a prompt.  `finish_reason`: stop, length, error or shed (then `error` says why).

    `logprobs` has a dict a token: the token's own id, and those of the most likely ones that were asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """The answers to one prompt.  `prompt_logprobs` starts with None: nothing predicts the first token.

    `num_cached_tokens` of the prompt were found in the cache, by that one of the answers which found the least.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[Logprobs | None] | None = None
    finished: bool = False
    num_cached_tokens: int | None = None


def spelled(token_id: int, found: TokenLogprobs, tokenizer: Tokenizer | None) -> Logprobs:
    """The most likely tokens first, then the token itself where it is not among them."""

    def entry(token: int, logprob: float, rank: int) -> Logprob:
        return Logprob(logprob, rank, None if tokenizer is None else tokenizer.token_text(token))

    out = {token: entry(token, logprob, i) for i, (token, logprob) in enumerate(found.top, 1)}
    out[token_id] = entry(token_id, found.logprob, found.rank)
    return out


class Answer:
    """Gathers the events of one sequence; text only where there is a tokenizer."""

    def __init__(self, output: CompletionOutput, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self.output = output
        self._tokenizer = tokenizer if params.detokenize else None
        self._text = AnswerText(self._tokenizer, params) if self._tokenizer else None

    def take(self, event: TokenEvent) -> bool:
        """True when a stop string ended the answer: the engine does not know yet."""
        out = self.output
        out.token_ids += event.token_ids
        if event.logprobs is not None:
            pairs = zip(event.token_ids, event.logprobs, strict=True)
            out.logprobs = [*(out.logprobs or []), *(spelled(t, lp, self._tokenizer) for t, lp in pairs)]
            out.cumulative_logprob = (out.cumulative_logprob or 0.0) + sum(
                lp.logprob for lp in event.logprobs
            )
        if self._text is not None:
            for i, token_id in enumerate(event.token_ids, 1):
                ends = event.finish_reason == "stop" and i == len(event.token_ids)
                out.text += self._text.push(token_id, ends)
            if self._text.matched is not None:
                out.finish_reason, out.stop_reason = "stop", self._text.matched
                return event.finish_reason is None
        if event.finish_reason is not None:
            if self._text is not None:
                out.text += self._text.finish()
            out.finish_reason, out.stop_reason = event.finish_reason, event.stop_reason
            out.error = event.error
        return False
