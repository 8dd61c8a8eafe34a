"""Limits: what a Batcher accepts and how much it puts in a step."""

from dataclasses import dataclass

from sched.step import Request


class QueueFull(ValueError):
    """`max_waiting` requests wait already; the caller may try later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`max_step_tokens` rows in a step, at most `max_chunk_tokens` of them of one request."""

    max_running: int
    max_step_tokens: int
    max_chunk_tokens: int
    max_model_len: int
    max_waiting: int

    def __post_init__(self) -> None:
        for name in ("max_running", "max_step_tokens", "max_chunk_tokens", "max_model_len", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_step_tokens < self.max_running:
            raise ValueError(
                f"max_step_tokens={self.max_step_tokens} must be at least max_running={self.max_running}"
            )

    def accept(self, request: Request, waiting: int = 0) -> None:
        """Raises ValueError where the request could never run, QueueFull where too many are `waiting`."""
        for name in ("prompt_tokens", "max_tokens"):
            if getattr(request, name) < 1:
                raise ValueError(
                    f"request {request.rid}: {name} must be at least 1, got {getattr(request, name)}"
                )
        length = request.prompt_tokens + request.max_tokens
        if length > self.max_model_len:
            raise ValueError(
                f"request {request.rid}: prompt_tokens={request.prompt_tokens} and max_tokens={request.max_tokens} "
                f"are {length} tokens, at most max_model_len={self.max_model_len} are possible"
            )
        if waiting >= self.max_waiting:
            raise QueueFull(f"request {request.rid}: max_waiting={self.max_waiting} requests wait already")
