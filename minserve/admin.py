"""`python -m minserve.admin URL|CONFIG.yaml [load|unload|sleep|wake NAME]`: moves the models of a running server.

Without a verb it shows where they are.  The key is MINSERVE_ADMIN_KEY, or the first in the file that the configuration
names; a server on this machine without any keys asks for none.
"""

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlencode

from minserve.keys import admin_keys
from minserve.residency import GOALS
from minserve.top import server_of

COLUMNS = ("id", "state", "doing", "pid", "requests", "sets", "reserve_sets", "restarts", "reason")


def call(method: str, url: str, key: str | None) -> Any:
    """What the server answers; ValueError in its words where it refuses, OSError where it cannot be reached."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        # however long it takes: the server ends it
        with urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers)) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = error.read()
        try:
            message = json.loads(said)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"{error.code} {error.reason}"
        raise ValueError(message) from None
    except urllib.error.URLError as error:
        raise ValueError(f"{url} does not answer: {error.reason}") from None


def table(models: Sequence[dict[str, Any]]) -> str:
    rows = [COLUMNS, *(tuple("" if m[c] is None else str(m[c]) for c in COLUMNS) for m in models)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m minserve.admin", description=__doc__.split("\n\n")[0])
    parser.add_argument("server", metavar="URL | CONFIG.yaml")
    parser.add_argument("verb", nargs="?", choices=list(GOALS))
    parser.add_argument("name", nargs="?", help="of the model")
    parser.add_argument(
        "--drain-s", metavar="S", help="unload, sleep: seconds for running requests, default 10"
    )
    parser.add_argument(
        "--level", metavar="N", help="sleep: 1 keeps the weights in host memory, 2 drops them"
    )
    parser.add_argument("--no-wait", action="store_true", help="do not wait until it is done")
    args = parser.parse_args(argv)
    if (args.verb is None) != (args.name is None):
        parser.error("a verb goes with the name of a model")
    given = {"drain_s": args.drain_s, "level": args.level, "wait": "false" if args.no_wait else None}
    query = urlencode({name: value for name, value in given.items() if value is not None})
    try:
        url, key = server_of(args.server, admin_keys)
        if args.verb is None:
            models = call("GET", f"{url}/admin/models", key)["data"]
        else:
            path = f"{url}/admin/models/{quote(args.name)}/{args.verb}"
            models = [call("POST", f"{path}?{query}" if query else path, key)]
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        sys.stderr.write(f"minserve: {error}\n")
        return 2
    sys.stdout.write(table(models) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
