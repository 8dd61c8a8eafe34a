"""What a client may ask: bodies of the OpenAI routes to validated values, or an ApiError with the status to send.

null means absent, unknown fields are accepted, and a field that would change the answer but is not built is refused.
Messages of errors are bounded, and so is what they show of a value.  Knows nothing of tokenizers, models or HTTP.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import orjson

from minserve.sampling import SamplingParams

MAX_PROMPTS = 256
MAX_SEQUENCES = 1024
MAX_MESSAGE_CHARS = 600
MAX_SALT_CHARS = 1024
SLO_LEAST_MS, SLO_MOST_MS = {"ttft_ms": 1.0, "tpot_ms": 0.1}, 3_600_000.0
KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "invalid_request_error", 409: "conflict_error", 413: "invalid_request_error", 415: "invalid_request_error",
    431: "invalid_request_error", 500: "server_error", 501: "server_error", 503: "overloaded_error",
}  # fmt: skip


class ApiError(Exception):
    """An answer with an error body; `retry_after_s` where the client should come again."""

    def __init__(
        self, status: int, message: str, code: str = "invalid_value", param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s
        self.message = message if len(message) <= MAX_MESSAGE_CHARS else message[:MAX_MESSAGE_CHARS] + "..."

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Body(msgspec.Struct, kw_only=True):
    """Fields that completions and chat share; the ranges are SamplingParams' and checked there."""

    model: str | None = None
    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] = {}
    seed: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = 0
    slo: dict[str, float | None] | None = None
    cache_salt: str | None = None
    return_tokens_as_token_ids: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def top_count(self) -> int | None:
        """How many alternatives a token's log probabilities show; None where none are wanted."""
        raise AssertionError("each route has its own")

    def params(self, max_tokens: int | None, prompt_logprobs: int | None = None) -> SamplingParams:
        """ApiError naming the field that is out of range."""
        own = {name: getattr(self, name) for name in SHARED}
        try:
            return SamplingParams(
                **own, max_tokens=max_tokens, stop=self.stops, stop_token_ids=tuple(self.stop_token_ids),
                logit_bias=token_keys(self.logit_bias), logprobs=self.top_count(), prompt_logprobs=prompt_logprobs,
            )  # fmt: skip
        except ValueError as error:
            name = str(error).split(" ", 1)[0]
            raise ApiError(400, str(error), param=name if name.isidentifier() else None) from None

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream=true", param="stream_options")
        if self.best_of not in (None, self.n):
            raise ApiError(400, f"best_of must equal n={self.n} or be absent", param="best_of")
        if not -(2**31) <= self.priority < 2**31:
            raise ApiError(400, "priority must be in [-2**31, 2**31)", param="priority")
        check_slo(self.slo)
        if self.cache_salt is not None and not 0 < len(self.cache_salt) <= MAX_SALT_CHARS:
            raise ApiError(
                400, f"cache_salt must be a string of 1 to {MAX_SALT_CHARS} characters", param="cache_salt"
            )


def check_slo(given: dict[str, float | None] | None) -> None:
    """Milliseconds, as a model's `slo` in the configuration; what is not there is taken from it."""
    for name, value in (given or {}).items():
        if name not in SLO_LEAST_MS:
            raise ApiError(
                400, f"slo holds {' and '.join(SLO_LEAST_MS)}, got {name!r:.100}", "unknown_field", "slo"
            )
        low = SLO_LEAST_MS[name]
        if value is not None and not low <= value <= SLO_MOST_MS:
            says = f"slo.{name} must be milliseconds in [{low:g}, {SLO_MOST_MS:g}], got {value:g}"
            raise ApiError(400, says, param=f"slo.{name}")


SHARED = (
    "n", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens",
)  # fmt: skip


class CompletionBody(Body, kw_only=True):
    prompt: Any = None
    max_tokens: int | None = 16
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True

    def top_count(self) -> int | None:
        return self.logprobs

    def checked_params(self) -> SamplingParams:
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens must be at least 1 (0 only with echo=true)", param="max_tokens")
        return self.params(self.max_tokens, self.logprobs if self.echo else None)

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt: text, or token ids as the client sent them."""
        p = self.prompt
        if isinstance(p, str):
            return [p]
        if not isinstance(p, list) or not p:
            raise ApiError(400, "prompt must be a string, a list of strings, or token ids", param="prompt")
        if all(type(x) is int for x in p):
            return [p]
        if len(p) > MAX_PROMPTS:
            raise ApiError(
                400, f"prompt may hold at most {MAX_PROMPTS} prompts, got {len(p)}", param="prompt"
            )
        for i, x in enumerate(p):
            ids = isinstance(x, list) and x and all(type(t) is int for t in x)
            if not isinstance(x, str) and not ids:
                what = "a string or a list of token ids, not empty"
                raise ApiError(400, f"prompt[{i}] must be {what}", param=f"prompt[{i}]")
        if len({type(x) for x in p}) > 1:
            raise ApiError(400, "prompt must not mix strings and token ids", param="prompt")
        return p


class ChatBody(Body, kw_only=True):
    messages: Any = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = {}

    def top_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def checked_params(self) -> SamplingParams:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        both = {v for v in (self.max_tokens, self.max_completion_tokens) if v is not None}
        if len(both) > 1:
            raise ApiError(400, "max_tokens and max_completion_tokens must not differ", param="max_tokens")
        limit = both.pop() if both else None
        if limit is not None and limit < 1:
            name = "max_tokens" if self.max_tokens is not None else "max_completion_tokens"
            raise ApiError(400, f"{name} must be at least 1, got {limit}", param=name)
        return self.params(limit)


class TokenizeBody(msgspec.Struct, kw_only=True):
    """Of a prompt, or of messages as the model's chat template shows them."""

    model: str | None = None
    prompt: str | None = None
    messages: Any = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    return_token_strs: bool = False


class DetokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: list[int]


def token_keys(bias: dict[str, float]) -> dict[int, float] | None:
    """JSON keys are strings; only plain decimal token ids pass."""
    for name in bias:
        if not name.isascii() or not name.isdigit() or len(name) > 10:
            raise ValueError("logit_bias keys must be token ids")
    return {int(k): v for k, v in bias.items()} or None


def read_messages(given: Any) -> list[dict[str, Any]]:
    """Messages with their content as one string, ready for a chat template."""
    if not isinstance(given, list) or not given:
        raise ApiError(400, "messages must be a list, not empty", param="messages")
    return [read_message(m, f"messages[{i}]") for i, m in enumerate(given)]


def read_message(given: Any, where: str) -> dict[str, Any]:
    if (
        not isinstance(given, dict)
        or not isinstance(given.get("role"), str)
        or not 0 < len(given["role"]) <= 64
    ):
        raise ApiError(400, f"{where} must be an object with a role", param=where)
    if given.get("tool_calls") or given.get("function_call"):
        raise ApiError(400, "tool calls are not supported", "unsupported_parameter", f"{where}.tool_calls")
    name = given.get("name")
    if name is not None and not isinstance(name, str):
        raise ApiError(400, f"{where}.name must be a string", param=f"{where}.name")
    message = {"role": given["role"], "content": read_content(given.get("content"), f"{where}.content")}
    return message if name is None else message | {"name": name}


def read_content(given: Any, where: str) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not given:
        raise ApiError(400, f"{where} must be a string or a list of parts", param=where)
    texts = []
    for i, part in enumerate(given):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            shown = f"{kind:.40}" if isinstance(kind, str) else "missing"
            raise ApiError(
                400, f"only parts of type text are read, {where}[{i}] is {shown}", param=f"{where}[{i}]"
            )
        if not isinstance(part.get("text"), str):
            raise ApiError(400, f"{where}[{i}].text must be a string", param=f"{where}[{i}].text")
        texts.append(part["text"])
    return "\n".join(texts)


# fields that would change the answer and are not built: the value that asks for nothing is let through
REFUSED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("tools", "functions", "bad_words", "structured_outputs", "suffix"), lambda v: not v),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), lambda v: False),
    **dict.fromkeys(
        ("chat_template", "allowed_token_ids", "prompt_logprobs", "prompt_embeds"), lambda v: False
    ),
    **dict.fromkeys(("truncate_prompt_tokens", "logits_processors", "audio"), lambda v: False),
    **dict.fromkeys(("tool_choice", "function_call"), lambda v: v in ("none", "auto")),
    "use_beam_search": lambda v: v is False,
    "modalities": lambda v: v == ["text"],
    "response_format": lambda v: isinstance(v, dict) and v.get("type") == "text",
}
Kind = TypeVar("Kind")


def read_object(data: bytes) -> dict[str, Any]:
    """The JSON object of a body without its nulls."""
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ApiError(
            400, f"The body is not valid JSON: {error.msg:.100} (byte {error.pos})", "invalid_json"
        ) from None
    if not isinstance(found, dict):
        raise ApiError(400, "The body must be a JSON object", "invalid_json")
    return {k: v for k, v in found.items() if v is not None}


def read_body(data: bytes, kind: type[Kind]) -> Kind:
    """A body of one route.  Types are checked here, ranges where they belong."""
    given = read_object(data)
    for name, harmless in REFUSED.items():
        if name in given and not harmless(given[name]):
            raise ApiError(400, f"{name} is not supported by this server", "unsupported_parameter", name)
    try:
        body = msgspec.convert(given, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        text, _, path = str(error).partition(" - at `$")
        param = path.rstrip("`").lstrip(".")[:80] or None
        raise ApiError(400, f"{param}: {text}" if param else text, "invalid_type", param) from None
    if isinstance(body, Body):
        body.check()
    return body
