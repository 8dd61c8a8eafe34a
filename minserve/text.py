"""Text in, text out: tokenizer, chat template, incremental detokenizer, stop strings.

Everything here works on bytes of tokens, so that a character split over two tokens is held back until it is whole,
and the text of an answer does not depend on how its tokens were grouped on the way.  Knows the two decoders that
Llama tokenizers have (byte level, and byte fallback with a word mark); another one is refused at load.  No torch.
"""

import codecs
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from minserve.model_config import read_json_object
from minserve.sampling import SamplingParams

WORD_MARK = "\u2581"
MAX_MESSAGES = 1024
MAX_RENDERED_CHARS = 8 << 20
RENDER_DEADLINE_S = 2.0
TEMPLATE_NAMES = frozenset(
    {"messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "documents"}
)


def byte_alphabet() -> dict[str, int]:
    """The byte of each character of a byte-level piece: printable Latin-1 stands for itself, the rest is shifted up."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(shifted)}


def decoder_kinds(decoder: Any) -> set[str]:
    """The types in a tokenizer.json decoder, sequences opened."""
    if not isinstance(decoder, dict):
        return set()
    return {str(decoder.get("type"))}.union(*(decoder_kinds(d) for d in decoder.get("decoders", ())))


class Tokenizer:
    """A model folder's tokenizer.json with its special tokens and chat template."""

    def __init__(self, inner: tokenizers.Tokenizer, names: Mapping[str, Any], template: str | None) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        kinds = decoder_kinds(json.loads(inner.decoder.__getstate__()) if inner.decoder else None)
        self._byte_level = "ByteLevel" in kinds
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise ValueError(
                f"tokenizer.json: decoder {sorted(kinds)} is not one of ByteLevel, ByteFallback, Metaspace"
            )
        self._alphabet = byte_alphabet() if self._byte_level else {}
        added = inner.get_added_tokens_decoder()
        self._added = {i: t.content.encode() for i, t in added.items()}
        self.special_ids = frozenset(i for i, t in added.items() if t.special)
        self.vocab_size = inner.get_vocab_size(with_added_tokens=True)
        self.longest_piece = max(map(len, inner.get_vocab(with_added_tokens=True)), default=1)
        self._bytes: dict[int, bytes] = {}
        self.bos_token, self.eos_token = (token_name(names.get(k)) for k in ("bos_token", "eos_token"))
        self.bos_id, self.eos_id = (
            inner.token_to_id(t) if t else None for t in (self.bos_token, self.eos_token)
        )
        self.chat = None if template is None else ChatTemplate(template, self.bos_token, self.eos_token)
        self._said = repr((template, self.bos_token, self.eos_token))

    @classmethod
    def load(cls, folder: Path | str, template: Path | str | None = None) -> "Tokenizer":
        """From a model folder, or a tokenizer.json with its neighbours; `template`: a chat template of its own."""
        path = Path(folder) if Path(folder).is_file() else Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder} has no tokenizer.json: save the tokenizer in the fast format first")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the only type that tokenizers raises
            raise ValueError(f"{path} cannot be read: {error!s:.200}") from error
        names: dict[str, Any] = {}
        for beside in ("special_tokens_map.json", "tokenizer_config.json"):
            if (path.parent / beside).is_file():
                names |= read_json_object(path.parent / beside)
        own = None if template is None else Path(template).read_text(encoding="utf-8")
        return cls(inner, names, read_template(path.parent, names) if own is None else own)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids.  Releases the GIL on the long part, so a long text may be encoded in a thread."""
        return list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; an incomplete character at its end is dropped."""
        return IncrementalDetokenizer(self, skip_special_tokens, at_start=True).push(token_ids)

    def fingerprint(self) -> bytes:
        """Equal for two that make the same token ids of every text and every conversation."""
        return hashlib.sha256((self._inner.to_str() + self._said).encode("utf-8", "surrogatepass")).digest()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text; empty for an id that the tokenizer does not know."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._spell(token_id)
            # an unknown id may come from anybody, and there is no end of them
            if known:
                self._bytes[token_id] = known
        return known

    def token_text(self, token_id: int) -> str:
        """For a person to read: a token that is half a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _spell(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        piece = self._inner.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if piece is None:
            return b""
        if self._byte_level:
            if all(c in self._alphabet for c in piece):
                return bytes(self._alphabet[c] for c in piece)
            return piece.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(WORD_MARK, " ").encode()

    def leading_space(self, token_id: int) -> bool:
        """True where the word mark of a first token would show as a space that the text never had."""
        return not self._byte_level and token_id not in self._added and self.token_bytes(token_id)[:1] == b" "


def token_name(value: Any) -> str:
    """A special token's text: tokenizer_config.json holds a string, an object with `content`, or null."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


class IncrementalDetokenizer:
    """Token ids in any grouping to text, each token once.  Never shows a character that is not whole.

    Bytes that can never become a character (a model may produce them) are U+FFFD, as in any UTF-8 decoder.
    `at_start`: the first token opens the text, so its word mark is not a space.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, at_start: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = at_start

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; what is left of a character waits for the next call."""
        pieces = []
        for token_id in token_ids:
            if token_id in self._skip:
                continue
            piece = self._tokenizer.token_bytes(token_id)
            if self._at_start and piece:
                self._at_start = False
                piece = piece[1:] if self._tokenizer.leading_space(token_id) else piece
            pieces.append(piece)
        return self._decoder.decode(b"".join(pieces))


class StopStrings:
    """Finds the first stop string to be completed, and holds back text that may be the start of one.

    One Knuth-Morris-Pratt automaton a string, so the work is constant per character and the result cannot depend on
    how the text was cut.  Where two strings are completed by one character the longer one counts.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._failure = [failure_table(s) for s in self._stops]
        self._state = [0] * len(self._stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of all text so far that can be shown now and was not shown before."""
        if not self._stops or self.matched is not None:
            return "" if self.matched is not None else text
        buffer = self._held + text
        for i in range(len(self._held), len(buffer)):
            found = self._advance(buffer[i])
            if found is not None:
                self.matched, self._held = found, ""
                return buffer[: i + 1 if self._include else i + 1 - len(found)]
        keep = max(self._state)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def finish(self) -> str:
        """Text still held when the answer ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        found: str | None = None
        for k, stop in enumerate(self._stops):
            n = self._state[k]
            while n and stop[n] != char:
                n = self._failure[k][n - 1]
            n += stop[n] == char
            if n == len(stop):
                found = stop if found is None or n > len(found) else found
                n = 0
            self._state[k] = n
        return found


def failure_table(pattern: str) -> list[int]:
    """table[i] = length of the longest proper prefix of pattern[:i+1] that is also its suffix."""
    table = [0] * len(pattern)
    n = 0
    for i in range(1, len(pattern)):
        while n and pattern[i] != pattern[n]:
            n = table[n - 1]
        n += pattern[i] == pattern[n]
        table[i] = n
    return table


class AnswerText:
    """The text of one answer, token by token, up to a stop string.

    Text of the first `min_tokens` tokens cannot stop it.  The stop token that ended it shows only where stop strings do.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, params.skip_special_tokens)
        self._include = params.include_stop_str_in_output
        self._stops = StopStrings(params.stop, self._include)
        self._exempt = params.min_tokens

    @property
    def matched(self) -> str | None:
        return self._stops.matched

    def push(self, token_id: int, is_stop: bool = False) -> str:
        """What this token makes visible; `is_stop`: it is the stop token that ended the answer."""
        if is_stop:
            return self._stops.finish() + (self._detokenizer.push((token_id,)) if self._include else "")
        text = self._detokenizer.push((token_id,))
        self._exempt -= 1
        return text if self._exempt >= 0 else self._stops.push(text)

    def finish(self) -> str:
        """Text still held when the answer ended without a stop string."""
        return self._stops.finish()


class ChatTemplate:
    """A model's own Jinja template, in a sandbox.  It comes from the model folder, never from a request.

    The sandbox bounds neither time nor memory, so the text is produced piece by piece under a deadline and a cap.
    """

    def __init__(self, source: str, bos_token: str, eos_token: str) -> None:
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        env.filters["tojson"] = to_json
        env.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
        try:
            self._template = env.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"the chat template does not compile: {error!s:.200}") from error
        self._names = {"bos_token": bos_token, "eos_token": eos_token}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text.  ValueError where the messages do not suit the template; may take RENDER_DEADLINE_S."""
        if not 1 <= len(messages) <= MAX_MESSAGES:
            raise ValueError(f"messages must hold 1 to {MAX_MESSAGES} entries, got {len(messages)}")
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message needs add_generation_prompt=false")
        shadowed = TEMPLATE_NAMES & set(extra or ())
        if shadowed:
            raise ValueError(f"chat_template_kwargs must not name {sorted(shadowed)}")
        names = {
            **(extra or {}),
            **self._names,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._bounded(names)
        except (
            jinja2.TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise ValueError(f"the chat template refused the messages: {error!s:.200}") from error
        return cut_after(text, messages[-1]["content"]) if continue_final_message else text

    def _bounded(self, names: Mapping[str, Any]) -> str:
        pieces, size, end = [], 0, time.monotonic() + RENDER_DEADLINE_S
        for piece in self._template.generate(names):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_RENDERED_CHARS:
                raise ValueError(f"the chat template wrote more than {MAX_RENDERED_CHARS} characters")
            if time.monotonic() > end:
                raise ValueError(f"the chat template took longer than {RENDER_DEADLINE_S} s")
        return "".join(pieces)


def cut_after(text: str, content: str) -> str:
    """`text` up to the end of its last `content`: the model goes on from there."""
    at = text.rfind(content.strip())
    if at < 0:
        raise ValueError("continue_final_message: the chat template does not show the last message as it is")
    return text[: at + len(content.strip())]


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter that templates are written for: transformers'."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def read_template(folder: Path, names: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or tokenizer_config.json's string, or the entry "default" of its list."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = names.get("chat_template")
    if isinstance(found, list):
        found = next(
            (t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None
        )
    return found if isinstance(found, str) else None
