"""The admin routes: where each model is, and POST /admin/models/NAME/VERB to load, unload, put to sleep or wake one.

Who may use them is the gate's to decide.  `?drain_s=N` (unload, sleep) are the seconds that running requests get,
`?level=1|2` (sleep) keeps the weights in host memory or drops them, `?wait=false` answers at once.
"""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response as Plain

from minserve.frontend import Frontend
from minserve.protocol import ApiError
from minserve.residency import GOALS, ResidencyError, StateError
from minserve.responses import reply
from minserve.served import Served

DRAIN_S = 10.0
MAX_DRAIN_S = 3600.0
OPTIONS = {
    "load": ("wait",),
    "unload": ("wait", "drain_s"),
    "sleep": ("wait", "drain_s", "level"),
    "wake": ("wait",),
}
WORDS = {"true": True, "1": True, "false": False, "0": False}


def read_options(verb: str, given: dict[str, str]) -> tuple[bool, dict[str, Any]]:
    """Whether to wait, and what `Residency.begin` takes; ApiError for what is not known or out of range."""
    for name in given:
        if name not in OPTIONS[verb]:
            raise ApiError(400, f"{verb} takes {', '.join(OPTIONS[verb])}, got {name!r:.100}", param=name)
    wait = WORDS.get(given.get("wait", "true").lower())
    if wait is None:
        raise ApiError(400, f"wait must be true or false, got {given['wait']!r:.100}", param="wait")
    keys: dict[str, Any] = {}
    if "drain_s" in OPTIONS[verb]:
        keys["drain_s"] = _seconds(given.get("drain_s"))
    if "level" in given:
        if given["level"] not in ("1", "2"):
            raise ApiError(400, f"level must be 1 or 2, got {given['level']!r:.100}", param="level")
        keys["level"] = int(given["level"])
    return wait, keys


def _seconds(given: str | None) -> float:
    try:
        value = DRAIN_S if given is None else float(given)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_DRAIN_S:
        limit = f"drain_s must be in [0, {MAX_DRAIN_S:.0f}] seconds, got {given!r:.100}"
        raise ApiError(400, limit, param="drain_s")
    return value


class AdminPages:
    def __init__(self, front: Frontend) -> None:
        self._front = front

    async def models(self, request: Request) -> Plain:
        data = [self._state(served) for served in self._front.models.values()]
        return reply({"object": "list", "data": data})

    async def model(self, request: Request) -> Plain:
        return reply(self._state(self._front.one(request.path_params["name"])))

    async def act(self, request: Request) -> Plain:
        verb, served = request.path_params["verb"], self._front.one(request.path_params["name"])
        if verb not in GOALS:
            raise ApiError(404, f"The verb must be one of {', '.join(GOALS)}, got {verb!r:.100}", "not_found")
        wait, keys = read_options(verb, dict(request.query_params))
        name = served.entry.name
        residency = self._front.agent.residencies.get(name)
        if self._front.draining:
            raise ApiError(503, "The server is shutting down.", "shutting_down", retry_after_s=10)
        if residency is None:
            says = f"The model {name} has no place in a pool: {served.host.reason}; correct that and restart the server."
            raise ApiError(409, says, "wrong_state")
        try:
            task = residency.begin(verb, **keys)
        except StateError as error:
            raise ApiError(409, str(error), "wrong_state") from None
        if task is not None and wait:
            try:
                await asyncio.shield(task)
            except ResidencyError as error:
                raise ApiError(503, str(error), f"{verb}_failed", retry_after_s=5) from None
        return reply(self._state(served), 200 if task is None or task.done() else 202)

    def _state(self, served: Served) -> dict[str, Any]:
        host, residency = served.host, self._front.agent.residencies.get(served.entry.name)
        return {
            "id": served.entry.name,
            "object": "model",
            "state": host.state,
            "reason": host.reason,
            "doing": residency and residency.doing,
            "pid": host.pid,
            "requests": host.num_requests,
            "sets": residency.held_sets if residency else 0,
            "reserve_sets": residency.reserve_sets if residency else 0,
            "restarts": host.restarts,
        }
