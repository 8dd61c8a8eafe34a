"""Which KV format a model runs with, beside the one that its checkpoint declares.  No torch: pools are planned with it."""

from typing import NamedTuple

from quant.formats.kv_scheme import KvScheme


class KvUse(NamedTuple):
    """`fmt`: the KV format that runs.  `declared`: the checkpoint's, None where it says nothing.  `static`: its scales
    are used."""

    fmt: str
    declared: KvScheme | None = None
    static: bool = False

    def of(self, fmt: str) -> "KvUse":
        """That of a layer in format `fmt`: the checkpoint's scales are of its own."""
        return self._replace(fmt=fmt, static=self.static and fmt == self.fmt)
