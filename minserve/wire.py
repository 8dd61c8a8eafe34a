"""What the agent and its workers say to each other: length-framed msgpack over an inherited socket pair.

A frame is 4 bytes of length (little endian) and one tagged message.  Nothing is ever unpickled, a frame has a size
cap, and a peer that breaks the framing is hung up on.  Knows neither engines nor HTTP.
"""

import os
import select
import socket
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

from minserve.sampling import SamplingParams

MAX_FRAME_BYTES = 64 << 20
MAX_FDS = 16  # beside what is read at a time
HEAD = struct.Struct("<I")


class WireError(ValueError):
    """The peer does not speak this protocol, or a message is too large for it."""


class Start(msgspec.Struct, tag=True, frozen=True):
    """The first message to a worker: a ModelEntry as plain values, and where its share of the pool is.

    `pool_fds` is the memfd of a pool in host memory, or goes with `pool_handle`, a PoolHandle of a GPU's.  `debug`: log
    what only that level shows, each layer of the model among it.  `sharing`: the mode of sm_share; `green`: first and
    count of the groups of SMs that the worker keeps to, (0, 0): it may use all it sees.
    """

    entry: dict[str, Any]
    device: str
    owner: int
    table_fd: int
    pool_fds: tuple[int, ...]
    pool_handle: str = ""
    debug: bool = False
    sharing: str = "none"
    green: tuple[int, int] = (0, 0)


class Submit(msgspec.Struct, tag=True, frozen=True):
    """One sequence to generate; the fields are EngineRequest's.  Times on the machine's monotonic clock."""

    rid: int
    prompt: tuple[int, ...]
    params: SamplingParams
    index: int = 0
    arrival_s: float | None = None
    ttft_s: float = 10.0
    tpot_s: float = 1.0
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""


class Abort(msgspec.Struct, tag=True, frozen=True):
    rid: int


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Asks for a Pong: the worker shows that its loop turns, and its counts."""

    seq: int


class Sleep(msgspec.Struct, tag=True, frozen=True):
    """Give back every slab set and, on a GPU, its memory: at level 1 the weights go to host memory, at level 2 they are
    dropped.  No request is under way."""

    level: int = 1


class Wake(msgspec.Struct, tag=True, frozen=True):
    """Be as before Sleep."""


class Segment(msgspec.Struct, tag=True, frozen=True):
    """Let go of a segment of the pool's memory, or, where it is `there`, map the descriptor that comes beside this frame."""

    index: int
    there: bool


class Stop(msgspec.Struct, tag=True, frozen=True):
    """End the process; requests under way are dropped."""


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Field for field the sampler's."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class TokenEvent(msgspec.Struct, array_like=True, frozen=True):
    """Field for field the engine's, so that the worker sends its own as they are."""

    rid: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int = 0


class Tokens(msgspec.Struct, tag=True, frozen=True):
    """What one step of the engine gave."""

    events: list[TokenEvent]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The request can never run; `error` goes to the caller."""

    rid: int
    error: str


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """The model can take requests.  `report`: lines about the load for the log."""

    max_model_len: int
    vocab_size: int
    report: tuple[str, ...] = ()


class LoadFailed(msgspec.Struct, tag=True, frozen=True):
    error: str


class Asleep(msgspec.Struct, tag=True, frozen=True):
    """Nothing of the pool is held any more.  `report`: a line for the log."""

    report: str = ""


class Awake(msgspec.Struct, tag=True, frozen=True):
    """Requests can come; or they cannot, for `error`, and the model is asleep as before."""

    report: str = ""
    error: str = ""


class SegmentDone(msgspec.Struct, tag=True, frozen=True):
    """Answers come in the order of the questions."""

    index: int
    error: str = ""


class Stats(msgspec.Struct, frozen=True):
    """`running`, `waiting` and `cached_blocks` are now, the rest totals since the start.  `late_compiles`: kernels that
    warm-up missed.  `prefix_queries` and `prefix_hits` count tokens of prompts.  `preemptions`: requests that lost
    their blocks and are computed again.  `step_error`: the mean part by which steps were predicted wrong of late."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    late_compiles: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    cached_blocks: int = 0
    preemptions: int = 0
    step_error: float = 0.0


class Pong(msgspec.Struct, tag=True, frozen=True):
    """`at_s`: when the worker answered, on the machine's monotonic clock."""

    seq: int
    stats: Stats
    at_s: float = 0.0


ToWorker = Start | Submit | Abort | Ping | Sleep | Wake | Segment | Stop
Told = Loaded | LoadFailed | Tokens | Refused | Pong | Asleep | Awake
FromWorker = Told | SegmentDone
Message = TypeVar("Message")


def encode(message: Any) -> bytes:
    """One frame.  WireError where the message is larger than a frame may be."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"a message of {len(body)} bytes is over the {MAX_FRAME_BYTES} of a frame")
    return HEAD.pack(len(body)) + body


class Frames(Generic[Message]):
    """Bytes as they arrive to whole messages of one union type."""

    def __init__(self, kinds: Any, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(kinds)
        self._buffer = bytearray()
        self._max_bytes = max_bytes

    def feed(self, data: bytes) -> Iterator[Message]:
        """Messages completed by `data`.  WireError for anything else than frames of this union."""
        self._buffer += data
        at = 0
        try:
            while len(self._buffer) - at >= HEAD.size:
                (size,) = HEAD.unpack_from(self._buffer, at)
                if size > self._max_bytes:
                    raise WireError(f"a frame of {size} bytes is over the {self._max_bytes} allowed")
                end = at + HEAD.size + size
                if len(self._buffer) < end:
                    break
                body = bytes(self._buffer[at + HEAD.size : end])
                at = end
                yield self._decode(body)
        finally:
            del self._buffer[:at]

    def _decode(self, body: bytes) -> Message:
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
            raise WireError(f"a frame of {len(body)} bytes is no known message: {error!s:.200}") from error


class Channel:
    """The worker's end: blocking sends, receives that wait as long as they are told.

    `fds`: descriptors that came beside frames, in their order, whoever takes one closes it.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        # not select: a descriptor inherited from a busy server may be over 1024
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._frames: Frames[ToWorker] = Frames(ToWorker)
        self.fds: deque[int] = deque()

    def send(self, message: Any) -> None:
        self._sock.sendall(encode(message))

    def receive(self, wait_s: float | None) -> list[ToWorker]:
        """All messages that are there after at most `wait_s`, None: at least one.  EOFError when the agent is gone."""
        got: list[ToWorker] = []
        wait_ms = None if wait_s is None else wait_s * 1000
        while True:
            if not self._poll.poll(0 if got else wait_ms):
                return got
            data, fds, _, _ = socket.recv_fds(self._sock, 1 << 20, MAX_FDS)
            for fd in fds:
                os.set_inheritable(fd, False)
            self.fds += fds
            if not data:
                raise EOFError("the agent is gone")
            got += self._frames.feed(data)
