"""The keys of a server: who may use it, and who may move its models.  From the environment, or a file with one a line."""

import os
from pathlib import Path

from minserve.config import ServerConfig


def api_keys(config: ServerConfig) -> tuple[str, ...]:
    """The keys that may use the server, none where it is open: MINSERVE_API_KEY and the lines of `api_keys_file`."""
    return _keys("MINSERVE_API_KEY", "server.api_keys_file", config.api_keys_file)


def admin_keys(config: ServerConfig) -> tuple[str, ...]:
    """The keys of the admin routes, likewise.  An API key is none: those who may ask are not those who may unload."""
    keys = _keys("MINSERVE_ADMIN_KEY", "server.admin_keys_file", config.admin_keys_file)
    if set(keys) & set(api_keys(config)):
        raise ValueError("an admin key must be none of the API keys")
    return keys


def _keys(variable: str, at: str, file: str | None) -> tuple[str, ...]:
    keys = [os.environ.get(variable, "")]
    if file is not None:
        lines = [line.strip() for line in Path(file).read_text().splitlines()]
        keys += (given := [line for line in lines if line and not line.startswith("#")])
        if not given:
            raise ValueError(f"{at} must hold a key on a line of its own, got none in {file!r}")
    for key_ in keys:
        # never the value itself: it is a secret
        if key_ and not (key_.isascii() and key_.isprintable() and " " not in key_):
            raise ValueError("an API key must be printable ASCII without spaces")
    return tuple(dict.fromkeys(k for k in keys if k))
