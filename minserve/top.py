"""`python -m minserve.top [URL | CONFIG.yaml]`: who holds the KV pools of a running server, live in a terminal.

It reads /metrics and nothing else, so it needs no more than the address (and, where keys are set, MINSERVE_API_KEY or
the file that the configuration names).  `--once` prints one table and ends.
"""

import argparse
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from minserve.config import ServerConfig, load_config
from minserve.keys import api_keys
from minserve.slab_counts import PLACES

ROW = re.compile(r"minserve:([a-z_]+)\{([^}]*)\} (\S+)")
LABEL = re.compile(r'([a-z_]+)="([^"]*)"')
COLOURS = {
    "live": "green",
    "prefix": "cyan",
    "partial": "yellow",
    "tail": "red",
    "draining": "magenta",
    "free": "dim",
}
TIMEOUT_S = 5.0
PIPE_WIDTH = 160

Key = tuple[str, str, str]  # metric, pool, model: "" where the metric has no such label


class Sample:
    """One answer of /metrics, and when it came."""

    def __init__(self, text: str, at_s: float) -> None:
        self.at_s = at_s
        self.values: dict[Key, float] = {}
        for name, labels, value in ROW.findall(text):
            found = dict(LABEL.findall(labels))
            self.values[name, found.get("pool", ""), found.get("model_name", "")] = float(value)

    def get(self, name: str, pool: str = "", model: str = "") -> float:
        return self.values.get((name, pool, model), 0.0)

    @property
    def pools(self) -> list[str]:
        return [pool for name, pool, _ in self.values if name == "kv_pool_bytes"]

    def models(self, pool: str) -> list[str]:
        return [model for name, of, model in self.values if name == "kv_sets" and of == pool]


def server_of(
    given: str | None, keys_of: Callable[[ServerConfig], tuple[str, ...]] = api_keys
) -> tuple[str, str | None]:
    """(URL, key) of a URL, a configuration file, or nothing: the default address."""
    if given is None or re.match(r"https?://", given):
        keys = keys_of(ServerConfig())
        return (given or "http://127.0.0.1:8000").rstrip("/"), keys[0] if keys else None
    server = load_config(given).server
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
    keys = keys_of(server)
    return f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}", keys[
        0
    ] if keys else None


def fetch(url: str, key: str | None) -> Sample:
    """OSError or ValueError, in words for the user, where there is no answer."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"the server must be a URL with http or https, got {url!r}")
    request = urllib.request.Request(f"{url}/metrics")
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return Sample(answer.read().decode(), time.monotonic())
    except urllib.error.HTTPError as error:
        hint = ": set MINSERVE_API_KEY, or name the configuration" if error.code == 401 else ""
        raise ValueError(f"{url}/metrics answers {error.code}{hint}") from None
    except urllib.error.URLError as error:
        raise OSError(f"{url} does not answer: {error.reason}") from None


def human(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


def bar(parts: dict[str, float], width: int) -> Text:
    """A line of `width` characters, in the colours of the places."""
    total, line, done, drawn = sum(parts.values()) or 1.0, Text(), 0.0, 0
    for place, size in parts.items():
        done += size
        cells = round(done / total * width) - drawn
        drawn += cells
        line.append(("·" if place == "free" else "█") * cells, style=COLOURS[place])
    return line


def pool_view(now: Sample, before: Sample | None, pool: str, width: int) -> Group:
    """A bar of the whole pool and a row a model; rates are since `before`."""
    models = now.models(pool)
    parts = {p: sum(now.get(f"kv_{p}_bytes", pool, m) for m in models) for p in PLACES}
    parts["free"] = now.get("kv_free_bytes", pool)
    size = now.get("kv_pool_bytes", pool)
    legend = Text("  ").join(
        Text(f"{place} {human(part)} ({part / size:.1%})", style=COLOURS[place])
        for place, part in parts.items()
    )
    rebuilds = now.get("kv_table_rebuilds_total", pool)
    title = Text(
        f"pool {pool}: {human(size)}" + (f", {rebuilds:.0f} table rebuilds" if rebuilds else ""), style="bold"
    )
    return Group(title, bar(parts, min(width, 120)), legend, model_table(now, before, pool, models))


def model_table(now: Sample, before: Sample | None, pool: str, models: list[str]) -> Table:
    """`off`: by how much its steps are predicted wrong."""
    columns = ("model", "run", "wait", "tok/s", "sets", "quota", "reserve", "demand", *PLACES,
               "leases/s", "refused", "given up", "moved", "reclaims", "worst ms", "hits", "off")  # fmt: skip
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)

    def rate(name: str, in_pool: str, model: str) -> str:
        if before is None or now.at_s <= before.at_s:
            return "-"
        # a restarted worker counts from 0 again
        more = max(0.0, now.get(name, in_pool, model) - before.get(name, in_pool, model))
        return f"{more / (now.at_s - before.at_s):,.1f}"

    for model in models:
        has_quota = ("kv_quota_sets", pool, model) in now.values
        asked = now.get("prefix_cache_queries_total", model=model)
        hits = f"{now.get('prefix_cache_hits_total', model=model) / asked:.0%}" if asked else "-"
        figures = [f"{now.get(name, pool, model):,.0f}" for name in ("kv_reserve_sets", "kv_demand_sets")]
        ends = ("kv_refused_total", "kv_given_up_sets_total", "kv_vacated_sets_total", "kv_reclaims_total")
        table.add_row(
            model,
            f"{now.get('requests_running', model=model):.0f}",
            f"{now.get('requests_waiting', model=model):.0f}",
            rate("generation_tokens_total", "", model),
            f"{now.get('kv_sets', pool, model):,.0f}",
            f"{now.get('kv_quota_sets', pool, model):,.0f}" if has_quota else "-",
            *figures,
            *(human(now.get(f"kv_{place}_bytes", pool, model)) for place in PLACES),
            rate("kv_leases_total", pool, model),
            *(f"{now.get(name, pool, model):,.0f}" for name in ends),
            f"{now.get('kv_reclaim_seconds_max', pool, model) * 1e3:.1f}",
            hits,
            f"{now.get('step_time_error', model=model):.0%}",
        )
    return table


def view(now: Sample, before: Sample | None, width: int) -> Group:
    if not now.pools:
        return Group(Text("no pool to show: the server has none, or a stopped worker sits on its table"))
    return Group(*(pool_view(now, before, pool, width) for pool in now.pools))


def run(url: str, key: str | None, interval_s: float, once: bool) -> int:
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    now = fetch(url, key)
    if once:
        console.print(view(now, None, console.width))
        return 0
    before: Sample | None = None
    with Live(
        view(now, None, console.width), console=console, auto_refresh=False, screen=sys.stdout.isatty()
    ) as live:
        while True:
            time.sleep(interval_s)
            before, now = now, fetch(url, key)
            live.update(view(now, before, console.width), refresh=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m minserve.top", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "server", nargs="?", metavar="URL | CONFIG.yaml", help="default http://127.0.0.1:8000"
    )
    parser.add_argument("--once", action="store_true", help="print one table and end")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="S", help="seconds between two looks, default 1"
    )
    args = parser.parse_args(argv)
    try:
        if not 0.1 <= args.interval <= 3600:
            raise ValueError(f"--interval must be in [0.1, 3600] seconds, got {args.interval}")
        url, key = server_of(args.server)
        return run(url, key, args.interval, args.once)
    except KeyboardInterrupt:
        return 0
    except (ValueError, OSError) as error:
        sys.stderr.write(f"minserve: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
