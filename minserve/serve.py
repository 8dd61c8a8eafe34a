"""`python -m minserve.serve CONFIG.yaml` or `--model PATH`: the server, from the command line to the last drain.

One process listens, tokenizes and watches; each model has a worker.  SIGTERM or SIGINT ends the taking of requests,
those under way get `shutdown_timeout_s`, a second signal ends everything at once.  A mistake of the user's is one
line and exit status 2.
"""

import argparse
import asyncio
import importlib.metadata
import ipaddress
import logging
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

import minserve
from minserve.agent import Agent
from minserve.config import (
    Config,
    ServerConfig,
    load_config,
)
from minserve.frontend import Frontend
from minserve.host import BOOT, ROOT, Host
from minserve.keys import admin_keys, api_keys
from minserve.listener import HttpServer, bind, raise_open_files
from minserve.model_flags import FOR_ALL, add_model_flags, model_flags
from minserve.served import check_groups
from minserve.server import Access, build_app
from minserve.text import Tokenizer
from minserve.wire import Stats

log = logging.getLogger("minserve")

STATUS_EVERY_S = 10.0


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m minserve.serve", description=__doc__.split("\n\n")[0])
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="see examples/full.yaml")
    parser.add_argument("--model", metavar="PATH", help="serve the one model in this folder, without a file")
    parser.add_argument("--host", help="default 127.0.0.1")
    parser.add_argument("--port", type=int, help="default 8000; 0 is any free port")
    parser.add_argument("--log-level", help="debug, info, warning or error")
    parser.add_argument(
        "--check", action="store_true", help="read everything, print the plan of the pool, and end"
    )
    parser.add_argument("--version", action="version", version=minserve.__version__)
    add_model_flags(parser)
    return parser.parse_args(argv)


def read_config(args: argparse.Namespace) -> Config:
    """ValueError or OSError with what the user has to change."""
    own = model_flags(args)
    if (args.config is None) == (args.model is None):
        raise ValueError("give either a CONFIG.yaml or --model PATH; examples/demo.yaml is one to try")
    alone = [name for name in own if name not in FOR_ALL]
    if args.config is not None and alone:
        raise ValueError(
            f"--{alone[0].replace('_', '-')} goes with --model; in a file it is a key of the model"
        )
    if args.model is not None:
        config = Config.single(args.model, **own)
    else:
        config = load_config(args.config)
        config = config.with_models(**own) if own else config
    config = config.with_server(host=args.host, port=args.port, log_level=args.log_level)
    config.check_here()
    return config


def banner() -> str:
    versions = " · ".join(f"{name} {installed(name)}" for name in ("torch", "triton", "uvicorn"))
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    found = (
        subprocess.run(git, capture_output=True, text=True, check=False) if (ROOT / ".git").exists() else None
    )
    revision = f" ({found.stdout.strip()})" if found is not None and found.returncode == 0 else ""
    return f"minserve {minserve.__version__}{revision} · Python {platform.python_version()} · {versions}"


def installed(name: str) -> str:
    # the metadata only: this process imports no torch
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def load_tokenizers(config: Config, broken: dict[str, str]) -> dict[str, Tokenizer | None]:
    """Tokenizers by model, one for all that read the same files; what is wrong with the others goes into `broken`."""
    found: dict[str, Tokenizer | None] = {}
    loaded: dict[tuple[str, str | None], Tokenizer] = {}
    for m in config.models:
        files = (m.tokenizer or m.path, m.chat_template)
        try:
            if files not in loaded:
                loaded[files] = Tokenizer.load(Path(files[0]), files[1])
            found[m.name] = loaded[files]
        except (ValueError, OSError) as error:
            broken[m.name] = str(error)
    return found


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Service:
    """A configured server: `run` returns the exit status."""

    def __init__(self, config: Config, boot: str) -> None:
        self._began = time.monotonic()
        self._config, self._url = config, ""
        broken: dict[str, str] = {}
        each = config.replicated()
        tokenizers = load_tokenizers(each, broken)
        check_groups(each, tokenizers)
        self.agent = Agent(each, broken, boot)
        self.front = Frontend(each, self.agent, tokenizers)
        app = build_app(self.front, access=access(config.server), max_body_bytes=config.server.max_body_bytes)
        self._http = HttpServer(app)
        self._signals = 0
        self._signalled = asyncio.Event()

    def describe(self) -> None:
        say(banner())
        for name, value in self._config.changed().items():
            say(f"  {name}: {value}")
        for pool in self.agent.pools:
            for line in pool.describe():
                say(line)

    async def run(self, listener: socket.socket) -> int:
        self._url = reachable(listener)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        self.agent.start()
        http = asyncio.create_task(self._http.serve(sockets=[listener]), name="http")
        status = asyncio.create_task(self._report(), name="status line")
        ended = asyncio.create_task(self._drain(), name="drain")
        code = 0
        if not await self._loaded():
            self._signalled.set()
            code = 1
        await asyncio.wait([http, ended], return_when=asyncio.FIRST_COMPLETED)
        self._http.should_exit = True
        await http
        status.cancel()
        await self.agent.stop()
        say("stopped")
        return code

    def _on_signal(self) -> None:
        self._signals += 1
        self.front.draining = True
        self._signalled.set()

    async def _loaded(self) -> bool:
        """Waits for the first load of all; False where no model can be served."""
        hosts = self.agent.hosts.values()
        everything = asyncio.create_task(self.agent.settled())
        stop = asyncio.create_task(self._signalled.wait())
        await asyncio.wait([everything, stop], return_when=asyncio.FIRST_COMPLETED)
        everything.cancel()
        stop.cancel()
        if self._signals:
            return True
        for host in hosts:
            if host.state == "failed":
                say(f"model {host.name} failed: {host.reason}")
        up, resting = ([h.name for h in hosts if h.state == state] for state in ("ready", "unloaded"))
        if not up and not resting:
            sys.stderr.write("minserve: no model could be loaded\n")
            return False
        served = ", ".join(up) or "no model yet"
        say(f"ready in {time.monotonic() - self._began:.1f} s: {self._url} serves {served}")
        if resting:
            say(f"not loaded: {', '.join(resting)}; python -m minserve.admin {self._url} load NAME loads one")
        if up:
            say(f"try, in another terminal:\n  {self._curl(up[0])}")
        return True

    def _curl(self, name: str) -> str:
        key = " -H 'Authorization: Bearer KEY'" if api_keys(self._config.server) else ""
        tokenizer = self.front.find(name).tokenizer
        if tokenizer is not None and tokenizer.chat is not None:
            path = "chat/completions"
            ask = '"messages": [{"role": "user", "content": "What is 17 + 25?"}]'
        else:
            path, ask = "completions", '"prompt": "Once upon a time"'
        body = f'{{"model": "{name}", {ask}, "max_tokens": 32, "temperature": 0}}'
        return f"curl {self._url}/v1/{path}{key} -H 'content-type: application/json' -d '{body}'"

    async def _drain(self) -> None:
        """From the first signal until nothing is under way, time is up, or the second signal."""
        await self._signalled.wait()
        limit = self._config.server.shutdown_timeout_s
        end = time.monotonic() + limit
        if self.front.num_requests:
            say(f"draining {self.front.num_requests} requests, at most {limit:.0f} s; once more to stop now")
        while self.front.num_requests and time.monotonic() < end and self._signals < 2:
            await asyncio.sleep(0.02)
        for host in self.agent.hosts.values():
            host.drop("The server is shutting down.")
        if self._signals >= 2:
            self._http.force_exit = True

    async def _report(self) -> None:
        """A line a model every STATUS_EVERY_S, silent when idle."""
        hosts = self.agent.hosts.values()
        before = {h.name: h.stats for h in hosts}
        while True:
            await asyncio.sleep(STATUS_EVERY_S)
            counts = await self.agent.counts()
            pools = [f"{c.leased}/{c.mapped}" for c in counts.values() if c is not None]
            for host in hosts:
                line = status_line(host, before[host.name])
                if line:
                    log.info("%s | slabs %s", line, " ".join(pools))
                before[host.name] = host.stats


def access(config: ServerConfig) -> Access:
    try:
        local = config.host == "localhost" or ipaddress.ip_address(config.host).is_loopback
    except ValueError:
        local = False  # a name: who knows where it leads
    return Access(api_keys(config), admin_keys(config), local)


def reachable(listener: socket.socket) -> str:
    """The URL to use on this machine."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def status_line(host: Host, before: Stats) -> str:
    """Rates since `before`; "" where nothing happened."""
    now = host.stats
    if not now.running and not now.waiting and now.steps == before.steps:
        return ""
    prompt = max(0, now.prompt_tokens - before.prompt_tokens) / STATUS_EVERY_S
    output = max(0, now.output_tokens - before.output_tokens) / STATUS_EVERY_S
    rates = f"prompt {prompt:.1f} tok/s | gen {output:.1f} tok/s"
    return f"{host.name}: {rates} | running {now.running} waiting {now.waiting}"


def check(service: Service) -> int:
    """What --check prints after the plan: models that cannot be served."""
    broken = {h.name: h.reason for h in service.agent.hosts.values() if h.state == "failed"}
    for name, reason in broken.items():
        say(f"model {name} failed: {reason}")
    return 2 if broken else 0


def main(argv: Sequence[str] | None = None, boot: str = BOOT) -> int:
    """The exit status.  `boot` is the code of a worker process: tests bring their own."""
    try:
        return begin(read_arguments(argv), boot)
    except KeyboardInterrupt:
        return 130  # before the loop took the signals over


def begin(args: argparse.Namespace, boot: str) -> int:
    try:
        config = read_config(args)
        service = Service(config, boot)
        # a plan can be looked at beside a server that runs
        listener = None if args.check else bind(config.server.host, config.server.port)
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"minserve: {error}\n")
        return 2
    level = config.server.log_level.upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLevelName(level)))
    raise_open_files()
    service.describe()
    return check(service) if listener is None else uvloop.run(service.run(listener))


if __name__ == "__main__":
    sys.exit(main())
