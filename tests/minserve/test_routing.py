"""Groups of precisions and replicas as HTTP clients see them: who answers, and what the answer says of it."""

import asyncio
from pathlib import Path

import pytest

from minserve.config import Config, parse_config
from minserve.served import Served, check_groups
from minserve.text import Tokenizer
from minserve.wire import Loaded
from sched.router import ReplicaState
from tests.minserve.site import CHAT, COMPLETIONS, TIERS, VOCAB, Site, run, settled, site, three
from tests.tiny import write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("m"), VOCAB)


def fake_pace(site: Site, first_s: dict[str, float]) -> None:
    """Each request that a model has makes the next one wait so much longer, whatever the clock says."""

    def state(served: Served, now: float, takes: bool) -> ReplicaState:
        name = served.entry.name
        return ReplicaState(
            name=name, tier=served.entry.tier, open=served.busy, first_s=first_s[name] * (1 + served.busy), takes=takes,
            recent=served.recent,
        )  # fmt: skip

    for served in site.front.models.values():
        served.state = state.__get__(served)  # type: ignore[method-assign]


def test_a_burst_goes_down_the_tiers_and_comes_back(folder: Path) -> None:
    async def story() -> None:
        s = three(folder, {"margin": 0.8, "hysteresis": 0.5})
        fake_pace(s, {"fp16": 0.1, "w8": 0.05, "w4": 0.02})
        burst = [s.begin(model="any", prompt=[1]) for _ in range(12)]
        await settled()
        # 0.32 s are the margin of the best tier's 0.4: three, six, the rest
        assert [h.num_requests for h in s.hosts.values()] == [3, 6, 3]
        for host in s.hosts.values():
            host.say()
        answers = await asyncio.gather(*burst)
        by = [a.by for a in answers]
        assert by == ["fp16"] * 3 + ["w8"] * 6 + ["w4"] * 3
        assert [a.json["model"] for a in answers] == by
        assert (await s.completed(model="any")).by == "fp16", "nothing is under way any more"
        assert s.metrics['group_chosen_total{group="any",model_name="fp16"}'] == 4
        assert s.metrics['group_slo_requests_total{group="any",model_name="w8"}'] == 6

    run(story)


def test_a_load_about_the_limit_does_not_move_every_request(folder: Path) -> None:
    async def story(hysteresis: float) -> list[str | None]:
        s = three(folder, {"margin": 0.8, "hysteresis": hysteresis})
        load = 0.0

        def state(served: Served, now: float, takes: bool) -> ReplicaState:
            name = served.entry.name
            first_s = load if name == "fp16" else 0.01
            return ReplicaState(name=name, tier=served.entry.tier, first_s=first_s, takes=takes)

        for served in s.front.models.values():
            served.state = state.__get__(served)  # type: ignore[method-assign]
        by = []
        for seconds in (0.30, 0.33, 0.30, 0.33, 0.30, 0.33, 0.30):
            load = seconds
            by.append((await s.completed(model="any")).by)
        return by

    assert asyncio.run(story(0.0)) == ["fp16", "w8", "fp16", "w8", "fp16", "w8", "fp16"]
    assert asyncio.run(story(0.2)) == ["fp16", *["w8"] * 6]


def test_a_name_gets_what_it_says(folder: Path) -> None:
    async def story() -> None:
        s = three(folder, {"policy": "cheapest"}, aliases=[])
        for name in TIERS:
            answer = await s.completed(model=name)
            assert (answer.by, answer.json["model"]) == (name, name)
        assert (await s.completed(model="any")).by == "w4"
        # streams and conversations say it too
        task = s.begin(CHAT, model="any", stream=True, messages=[{"role": "user", "content": "hi"}])
        await settled()
        s.hosts["w4"].say()
        answer = await task
        assert (answer.by, answer.events[0]["model"], answer.events[-1]) == ("w4", "w4", None)
        missing = await s.ask(COMPLETIONS, model="none", prompt="x")
        assert (missing.status, missing.by) == (404, None)
        assert "any" in missing.json["error"]["message"]

    run(story)


def test_who_cannot_take_it_is_passed_over(folder: Path) -> None:
    async def story() -> None:
        s = three(folder, max_queued_requests=2)
        s.hosts["fp16"].state = "asleep"
        assert (await s.completed(model="any")).by == "w8"
        s.hosts["w8"].stalled = True
        assert (await s.completed(model="any")).by == "w4"
        s.hosts["w4"].state = "failed"
        assert (await s.completed(model="any")).by == "w8", "a stalled one is better than none"
        s.hosts["w8"].state = "loading"
        refused = await s.ask(COMPLETIONS, model="any", prompt="x")
        assert (refused.status, refused.json["error"]["code"]) == (503, "model_asleep")
        s.hosts["w8"].state, s.hosts["w8"].stalled = "ready", False
        two = [s.begin(model="any", prompt="x") for _ in range(2)]
        await settled()
        refused = await s.ask(COMPLETIONS, model="any", prompt="x")
        assert refused.status == 503, "one sleeps, one has failed, one is full"
        s.hosts["w8"].say()
        assert [a.by for a in await asyncio.gather(*two)] == ["w8", "w8"]

    run(story)


def test_a_prompt_goes_where_its_window_is(folder: Path) -> None:
    async def story() -> None:
        models = [
            {"name": n, "group": "any", "tier": i, "max_model_len": w}
            for i, (n, w) in enumerate((("short", 16), ("long", 64)))
        ]
        s = site(folder, models)
        assert (await s.completed(model="any", prompt=[1] * 15)).by == "short"
        assert (await s.completed(model="any", prompt=[1] * 16)).by == "long"
        too_long = await s.ask(COMPLETIONS, model="any", prompt=[1] * 64)
        assert (too_long.status, too_long.json["error"]["code"]) == (400, "context_length_exceeded")
        assert (await s.ask("/v1/models/any", "GET")).json["max_model_len"] == 64

    run(story)


def test_a_conversation_stays_where_its_prompt_is(folder: Path) -> None:
    async def story() -> None:
        s = three(folder)
        fake_pace(s, {"fp16": 0.1, "w8": 0.05, "w4": 0.02})
        prompt = list(range(100))
        s.hosts["fp16"].state = "loading"
        assert (await s.completed(model="any", prompt=prompt)).by == "w8"
        s.hosts["fp16"].state = "ready"
        assert (await s.completed(model="any", prompt=[*prompt, 5, 6])).by == "w8"
        assert (await s.completed(model="any", prompt=[7, *prompt])).by == "fp16"
        assert (await s.completed(model="any", prompt=prompt, cache_salt="mine")).by == "fp16"
        again = s.begin(model="any", prompt=[*prompt, 8], slo={"ttft_ms": 10})
        await settled()
        assert s.hosts["w8"].num_requests == 0, "it would miss there"
        for host in s.hosts.values():
            host.say()
        await again

    run(story)


def test_without_a_cache_nothing_stays(folder: Path) -> None:
    async def story() -> None:
        s = three(folder, enable_prefix_caching=False)
        s.hosts["fp16"].state = "loading"
        assert (await s.completed(model="any", prompt=list(range(100)))).by == "w8"
        s.hosts["fp16"].state = "ready"
        assert (await s.completed(model="any", prompt=list(range(100)))).by == "fp16"

    run(story)


def test_what_a_cache_held_goes_with_its_process(folder: Path) -> None:
    async def story() -> None:
        s = three(folder, {"policy": "best"})
        await s.completed(model="any", prompt=list(range(100)))
        served = s.front.models["fp16"]
        assert len(served.recent) == 3
        s.hosts["fp16"].loaded = Loaded(256, VOCAB)
        await s.completed(model="any", prompt=[1, 2])
        assert len(served.recent) == 0

    run(story)


# -- replicas


def test_replicas_share_the_requests_for_their_name(folder: Path) -> None:
    async def story() -> None:
        s = site(folder, [{"name": "m", "aliases": ["z"], "placement": ["gpu0", "gpu1"]}, {"name": "o"}])
        assert list(s.hosts) == ["m@gpu0", "m@gpu1", "o"]
        four = [s.begin(model=name, prompt="x") for name in ("m", "z", "m", "z")]
        await settled()
        assert [h.num_requests for h in s.hosts.values()] == [2, 2, 0]
        for host in s.hosts.values():
            host.say()
        answers = await asyncio.gather(*four)
        assert [a.by for a in answers] == ["m@gpu0", "m@gpu1", "m@gpu0", "m@gpu1"]
        assert {a.json["model"] for a in answers} == {"m"}
        assert (await s.completed(model="m@gpu1")).by == "m@gpu1"
        listed = (await s.ask("/v1/models", "GET")).json["data"]
        assert [m["id"] for m in listed] == ["m", "o"]
        assert listed[0]["members"] == ["m@gpu0", "m@gpu1"]
        s.hosts["m@gpu0"].state = "loading"
        assert (await s.ask("/ready", "GET", "model=m")).status == 200
        s.hosts["m@gpu1"].state = "loading"
        assert (await s.ask("/ready", "GET", "model=m")).status == 503

    run(story)


def test_groups_are_listed_and_not_administered(folder: Path) -> None:
    async def story() -> None:
        s = three(folder)
        listed = (await s.ask("/v1/models", "GET")).json["data"]
        assert [m["id"] for m in listed] == [*TIERS, "any"]
        assert listed[3]["members"] == list(TIERS)
        assert "members" not in listed[0]
        refused = await s.ask("/admin/models/any/sleep")
        assert refused.status == 400
        assert "fp16, w8, w4" in refused.json["error"]["message"]
        assert (await s.ask("/tokenize", model="any", prompt="hello")).json["count"] > 0

    run(story)


def test_models_of_a_group_read_text_alike(folder: Path, tmp_path: Path) -> None:
    models = [{"name": n, "path": "m", "group": "g"} for n in ("a", "b")]
    config: Config = parse_config({"models": models}, tmp_path)
    same, other = (Tokenizer.load(write_tokenizer(tmp_path / str(v), v)) for v in (VOCAB, VOCAB + 1))
    check_groups(config, {"a": same, "b": Tokenizer.load(folder)})
    check_groups(config, {"a": same, "b": None})
    with pytest.raises(ValueError, match=r"group g must have the same tokenizer.*a and b"):
        check_groups(config, {"a": same, "b": other})
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    talks = Tokenizer.load(folder, tmp_path / "t.jinja")
    with pytest.raises(ValueError, match="chat template"):
        check_groups(config, {"a": same, "b": talks})


def test_every_name_leads_somewhere(folder: Path) -> None:
    s = site(
        folder, [{"name": "m", "placement": ["gpu0", "gpu1"], "group": "g"}, {"name": "n", "group": "g"}]
    )
    assert list(s.front._by_name) == ["m", "n", "m@gpu0", "m@gpu1", "g"]
    assert [x.entry.name for x in s.front.target("g").members] == ["m@gpu0", "m@gpu1", "n"]
