"""The keys of cached blocks.  key = sha256(key of the block before, token ids of this one), from a root that says whose.

A token is four bytes whatever its value and a block a fixed number of tokens, so no two sequences spell the same
bytes; a part of the root is written behind its length.  Equal keys mean equal tokens from the first on, under one root:
the keys and values behind them are the same, since a stored block depends on nothing else.
"""

from array import array
from collections.abc import Iterable, Sequence
from hashlib import sha256

TOKEN_BYTES = array("I").itemsize
assert TOKEN_BYTES == 4, f"an unsigned int has {TOKEN_BYTES} bytes here"


def root_key(*parts: str) -> bytes:
    """Where chains begin: two of them share a block only where all parts are equal, one by one."""
    digest = sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


class KeyChain:
    """The keys of one growing sequence; a block is hashed once, when its last token is there.

    `parent` is the key of the last full block, or the root while there is none.
    """

    __slots__ = ("_tail", "block_tokens", "parent")

    def __init__(self, root: bytes, block_tokens: int) -> None:
        self.parent = root
        self.block_tokens = block_tokens
        self._tail = array("I")  # of the block that is not full yet

    def extend(self, tokens: Sequence[int]) -> tuple[bytes, ...]:
        """The keys of the blocks that these tokens fill.  Token ids are in [0, 2**32)."""
        self._tail.extend(tokens)
        full = len(self._tail) // self.block_tokens
        if not full:
            return ()
        data, size = self._tail.tobytes(), TOKEN_BYTES * self.block_tokens
        keys, parent = [], self.parent
        for at in range(0, full * size, size):
            parent = sha256(parent + data[at : at + size]).digest()
            keys.append(parent)
        del self._tail[: full * self.block_tokens]
        self.parent = parent
        return tuple(keys)


def keys_of(root: bytes, tokens: Iterable[int], block_tokens: int) -> tuple[bytes, ...]:
    """Of a whole sequence at once."""
    return KeyChain(root, block_tokens).extend(tuple(tokens))
