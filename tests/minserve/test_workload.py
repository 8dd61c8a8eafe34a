"""The sources of `python -m minserve.workload`, each against a file written by hand, and what it says of wrong ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minserve.workload import main
from minserve.workload_saved import load_workload, read_fineserve
from minserve.workload_tables import read_azure, read_burst, read_jsonl, read_sharegpt
from sched.workload import Workload
from tests.tiny import write_tokenizer

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.1805900,396,109
2023-11-16 18:15:48.6805900,0,0
"""
BURST = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,,3,ChatGPT,472,18,490,Conversation log
45,s1,2,ChatGPT,1087,230,1317,Conversation log
118,,1,GPT-4,417,276,693,API log
120,,0,GPT-4,417,0,417,API log
185,s1,2,ChatGPT,1360,647,2007,Conversation log
"""
OLD_BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,GPT-4,1,2,3,API log\n"
FINESERVE = {
    "info": {"rates": [["m0", 2.0], ["m1", 1]], "start": 0, "duration": 9, "num_requests": [1, 1], "distribution": "poisson"},
    "arrivals": [0.25, 1.5],
    "requests": [
        {"model_name": "m1", "slo": None, "idx": 0, "data": [[1, 2, 3], 3, 40], "arrival_time": None},
        {"model_name": "m0", "slo": 1.25, "idx": 1, "data": [[7], 1, 2], "dropped": False},
    ],
}  # fmt: skip


def written(folder: Path, content: Any, name: str = "source") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def talk(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": who, "value": value} for who, value in turns]}


def test_azure(tmp_path: Path) -> None:
    rows = read_azure(written(tmp_path, AZURE))
    assert rows.times_s == pytest.approx([0.0, 2.0, 3.5])
    assert (rows.prompts.tolist(), rows.outputs.tolist()) == ([374, 1, 396], [44, 1, 109])


def test_burstgpt_has_two_models_and_no_failures(tmp_path: Path) -> None:
    rows = read_burst(written(tmp_path, BURST))
    assert rows.times_s is not None
    assert rows.times_s.tolist() == [0, 40, 113, 180]
    assert rows.names == ("ChatGPT", "ChatGPT", "GPT-4", "ChatGPT")
    assert rows.sessions == ("", "s1", "", "s1")
    assert (rows.prompts.tolist(), rows.outputs.tolist()) == ([472, 1087, 417, 1360], [18, 230, 276, 647])
    assert read_burst(written(tmp_path, OLD_BURST)).sessions == ("",)


def test_sharegpt_takes_first_turns_of_the_lengths_that_others_keep(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        [
            talk(("system", "be brief"), ("human", "a" * 40), ("gpt", "b" * 80), ("human", "c" * 900), ("gpt", "d")),
            talk(("gpt", "b" * 80)),
            talk(("human", "a" * 8), ("gpt", "b" * 80)),
            talk(("human", "a" * 40), ("gpt", "b" * 8)),
            talk(("human", "a" * 9000), ("gpt", "b" * 80)),
            talk(("human", "a" * 8000), ("gpt", "b" * 8400)),
            talk(("user", "a" * 8192), ("assistant", "b" * 8192)),
            talk(),
        ],
    )  # fmt: skip
    rows = read_sharegpt(file)
    assert list(zip(rows.prompts.tolist(), rows.outputs.tolist(), strict=True)) == [(10, 20), (2048, 2048)]
    assert rows.times_s is None
    assert read_sharegpt(file, lambda text: len(text) // 2).prompts.tolist() == [20, 4, 20]


def test_jsonl(tmp_path: Path) -> None:
    lines = [
        {"prompt_tokens": 5, "output_tokens": 6, "arrival_s": 3.0, "model": "b"},
        {"prompt": "x" * 40, "output": "y" * 4, "arrival_s": 1, "model": "a", "session": 7},
    ]
    rows = read_jsonl(written(tmp_path, "\n".join(map(json.dumps, lines)) + "\n\n"))
    assert rows.times_s is not None
    assert rows.times_s.tolist() == [0.0, 2.0]
    assert (rows.prompts.tolist(), rows.outputs.tolist()) == ([10, 5], [1, 6])
    assert (rows.names, rows.sessions) == (("a", "b"), ("7", ""))


def test_fineserve(tmp_path: Path) -> None:
    found = read_fineserve(written(tmp_path, FINESERVE), seed=3)
    rows = [(r.model, r.arrival_s, r.prompt_tokens, r.output_tokens, r.ttft_slo_s) for r in found.requests]
    assert rows == [("m1", 0.25, 3, 40, None), ("m0", 1.5, 1, 2, 1.25)]
    assert (found.duration_s, found.seed, found.info["rates"]) == (9.0, 3, {"m0": 2.0, "m1": 1})


WRONG: list[tuple[str, Any, str]] = [
    ("azure", "a,b\n1,2\n3,4\n", "must have columns TIMESTAMP, ContextTokens, GeneratedTokens and 2 rows, got a, b"),
    ("azure", AZURE.replace("109", "1e3"), "row 2: GeneratedTokens must be an integer in [0, 16777216], got '1e3'"),
    ("azure", AZURE.replace("396", "-4"), "row 2: ContextTokens must be an integer"),
    ("azure", AZURE.replace("2023-11-16 18:15:50", "soon"), "row 2"),
    ("azure", AZURE + "2023-11-16 18:15:48,5\n", "row 4: GeneratedTokens"),
    ("burstgpt", AZURE, "must have columns Timestamp, Model, Request tokens, Response tokens"),
    ("burstgpt", BURST.replace("118,", "nan,"), "row 3: Timestamp must be seconds >= 0, got 'nan'"),
    ("burstgpt", "\n".join(BURST.splitlines()[i] for i in (0, 4)), "got failures alone"),
    ("sharegpt", "[", "is not JSON"),
    ("sharegpt", "[" * 100_000, "is not JSON"),
    ("sharegpt", {}, "must be a list of conversations, got dict"),
    ("sharegpt", [{"id": 1}], "row 1: a conversation must have a list `conversations`"),
    ("sharegpt", [{"conversations": [{"from": "human", "value": 3}]}], "row 1: a turn must have the texts"),
    ("sharegpt", [talk()], "got none of 1"),
    ("jsonl", '{"prompt_tokens": 1}', "row 1: output_tokens must be an integer in [1, 16777216], got 'None'"),
    ("jsonl", '{"prompt_tokens": 1, "output_tokens": 1, "x": 1}', "with keys of prompt_tokens"),
    ("jsonl", '{"prompt_tokens": 1, "output_tokens": true}', "row 1: output_tokens"),
    ("jsonl", '{"prompt_tokens": 1, "output_tokens": 1, "arrival_s": 0}\n{"prompt_tokens": 1, "output_tokens": 1}', "in every line or in none, got none in row 2"),
    ("fineserve", {"info": {}}, "with info, arrivals and requests"),
    ("fineserve", FINESERVE | {"arrivals": [1]}, "must be as many, got 1 and 2"),
    ("fineserve", FINESERVE | {"arrivals": [1, "x"]}, "requests[1]: its arrival must be seconds >= 0, got 'x'"),
    ("fineserve", FINESERVE | {"requests": [{"model_name": "m"}] * 2}, "requests[0]: must have model_name and data"),
    ("saved", AZURE, "line 1: must be a JSON object"),
    ("saved", "", "line 1: must be a JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "content", "says"), WRONG)
def test_a_wrong_file_is_said(
    source: str, content: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, content)
    assert main([source, str(file), "--models", "a,b", "--rate", "1"]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert str(file) in said


def test_any_damage_is_said_or_read(tmp_path: Path) -> None:
    """Nothing but ValueError comes out, whatever is in the file."""
    good = {
        "azure": AZURE, "burstgpt": BURST, "fineserve": json.dumps(FINESERVE),
        "sharegpt": json.dumps([talk(("human", "a" * 40), ("gpt", "b" * 80))]),
        "jsonl": '{"prompt_tokens": 5, "output_tokens": 6, "arrival_s": 3.0, "model": "b"}\n' * 2,
    }  # fmt: skip
    readers: dict[str, Any] = {
        "azure": read_azure, "burstgpt": read_burst, "sharegpt": read_sharegpt, "jsonl": read_jsonl, "fineserve": read_fineserve,
    }  # fmt: skip
    rng, refused = np.random.default_rng(5), 0
    for name, text in good.items():
        for _ in range(60):
            data = bytearray(text.encode())
            for _ in range(int(rng.integers(1, 4))):
                at = int(rng.integers(len(data)))
                if rng.integers(2):
                    data[at] = int(rng.integers(256))
                else:
                    del data[at : at + int(rng.integers(1, 60))]
                data = data or bytearray(b"x")
            file = tmp_path / "damaged"
            file.write_bytes(data)
            try:
                found = readers[name](file)
            except ValueError as error:
                refused += 1
                said = str(error)
                if str(file) not in said:
                    raise
            else:
                assert len(found.requests if isinstance(found, Workload) else found) > 0
    assert refused > 120


def config(folder: Path, models: list[dict[str, Any]]) -> str:
    return str(written(folder, {"models": [{"path": "m", **m} for m in models]}, "config.yaml"))


def test_a_configuration_gives_models_rates_lengths_and_slos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slo, lengths = {"ttft_ms": 300, "tpot_ms": 40}, {"prompt_tokens": 200, "output_tokens": 50}
    models = [
        {"name": "big", "rate": 6, "slo": slo, "lengths": lengths},
        {"name": "small", "rate": 2, "max_model_len": 300},
    ]
    file, out = config(tmp_path, models), tmp_path / "w.jsonl"
    assert main(["synthetic", "--config", file, "--out", str(out), "--seed", "4", "--duration", "500"]) == 0
    found = load_workload(out)
    assert found.rates() == pytest.approx({"big": 6, "small": 2}, rel=0.1)
    assert (found.slos["big"].ttft_s, found.slos["big"].tpot_s) == (0.3, 0.04)
    assert np.mean([r.prompt_tokens for r in found.requests if r.model == "big"]) == pytest.approx(
        200, rel=0.1
    )
    assert max(r.prompt_tokens + r.output_tokens for r in found.requests if r.model == "small") <= 300
    said = capsys.readouterr().out
    assert all(words in said for words in ("lognormal", "CV 1", "big", "small", str(out)))
    again = tmp_path / "again.jsonl"
    flags = ["synthetic", "--config", file, "--out", str(again), "--seed", "4", "--duration", "500"]
    assert main(flags) == 0
    assert again.read_bytes() == out.read_bytes()
    assert main([*flags, "--rate", "16", "--alpha", "2"]) == 0
    rates = load_workload(again).rates()
    assert max(rates.values()) / sum(rates.values()) == pytest.approx(0.8, abs=0.03)
    assert "k^-alpha" in capsys.readouterr().out


def test_texts_are_counted_by_the_tokenizer_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokenizer(tmp_path / "m", 400)
    file = written(tmp_path, [talk(("human", "tell me of it " * 4), ("gpt", "here it is " * 4))])
    flags = ["sharegpt", str(file), "--models", "a", "--rate", "5", "--duration", "20"]
    assert main(flags) == 0
    assert "characters / 4" in capsys.readouterr().out
    assert main([*flags, "--tokenizer", str(tmp_path / "m")]) == 0
    assert f"tokens of {tmp_path / 'm'}" in capsys.readouterr().out


def test_a_trace_keeps_its_own_arrivals_unless_told(tmp_path: Path) -> None:
    source, out = written(tmp_path, BURST), tmp_path / "w.jsonl"
    models = config(tmp_path, [{"name": "rare", "rate": 1}, {"name": "often", "rate": 3}])
    flags = ["burstgpt", str(source), "--config", models, "--out", str(out)]
    assert main(flags) == 0
    found = load_workload(out)
    assert [r.model for r in found.requests] == ["often", "often", "rare", "often"]
    assert [r.arrival_s for r in found.requests] == [0, 40, 113, 180]
    assert main([*flags, "--map", "ChatGPT=rare,GPT-4=often", "--rate-scale", "2"]) == 0
    found = load_workload(out)
    assert [r.model for r in found.requests] == ["rare", "rare", "often", "rare"]
    assert [r.arrival_s for r in found.requests] == [0, 20, 56.5, 90]
    assert main([*flags, "--arrivals", "drawn", "--duration", "100"]) == 0
    assert load_workload(out).rates() == pytest.approx({"often": 3, "rare": 1}, rel=0.35)
    other = tmp_path / "other.jsonl"
    assert main(["saved", str(out), "--only", "rare", "--out", str(other), "--merge", str(out)]) == 0
    rares = sum(r.model == "rare" for r in load_workload(out).requests)
    assert len(load_workload(other).requests) == len(load_workload(out).requests) + rares


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["synthetic"], "--models must be names"),
        (["synthetic", "--models", "a,a"], "each once, got 'a,a'"),
        (["synthetic", "--models", "a,b"], "a rate must be given for a, b"),
        (["synthetic", "--models", "a", "--alpha", "1"], "--rate must give it"),
        (["synthetic", "--models", "a", "--rate", "1", "--arrivals", "trace"], "needs a source with times"),
        (["synthetic", "x", "--models", "a"], "takes no file"),
        (["azure", "--models", "a"], "needs a file"),
        (["azure", "/nowhere/x.csv", "--models", "a"], "'/nowhere/x.csv' cannot be read"),
        (["synthetic", "--models", "a", "--rate", "1", "--cut", "5:x"], "--cut must be START:END"),
        (["synthetic", "--models", "a", "--rate", "1", "--cut", "5:1"], "got '5:1'"),
        (["synthetic", "--models", "a", "--rate", "1", "--only", "b"], "models must be among a, got b"),
        (["synthetic", "--models", "a", "--rate", "1", "--seed", "-1"], "--seed must be"),
        (["synthetic", "--models", "a", "--rate", "nan"], "must be"),
        (["synthetic", "--models", "a", "--rate", "1", "--rate-scale", "0"], "--rate-scale must be > 0"),
        (["synthetic", "--models", "a", "--rate", "1", "--rate-scale", "1e300"], "must be > 0 and turn the 600 s into 0.001 to 1e+09 s, got 1e+300"),
        (["synthetic", "--models", "a", "--rate", "1e15"], "rate x duration must make at most 10000000 requests, got 1e+15 a second for 600 s"),
        (["synthetic", "--models", "a", "--rate", "inf"], "rate x duration must make at most 10000000 requests, got inf"),
        (["synthetic", "--models", "a", "--rate", "1", "--max-len", "9" * 23], "--max-len must be tokens in [2, 16777216], got 99999"),
        (["synthetic", "--models", "a", "--rate", "1", "--prompt-tokens", "1e300"], "--prompt-tokens must be tokens in [1, 16777216], got 1e+300"),
        (["synthetic", "--models", "a", "--rate", "1", "--prompt-median", "1e-300"], "--prompt-median must be tokens in [1, 16777216]"),
        (["synthetic", "--models", "a", "--rate", "1", "--duration", "1e10"], "--duration must be seconds > 0 and at most 1e+09, got"),
        (["synthetic", "--models", "a", "--rate", "1", "--output-tokens", "0"], "--output-tokens must be tokens in [1, 16777216], got"),
        (["synthetic", "--models", "a", "--rate", "1", "--output-median", "nan"], "--output-median must be tokens in [1, 16777216], got"),
        (["synthetic", "--models", "a,b", "--rate", "1", "--groups", "2", "--on-s", "1e-12"], "on_s must be at least 0.001 s"),
        (["synthetic", "--models", "a,b", "--rate", "1e-3", "--groups", "2", "--on-s", "1", "--duration", "9e8"], "on_s must be at least 900 s"),
        (["synthetic", "--models", "a", "--rate", "1", "--turns", "1e300"], "turns must be a number in [1, 10000], got 1e+300"),
        (["synthetic", "--models", "a", "--rate", "1", "--prefixes", "9" * 23], "prefixes must be a number in [1, 2147483648]"),
        (["synthetic", "--models", "a", "--rate", "1e-9", "--duration", "1"], "no request came of it"),
        (["synthetic", "--config", "/nowhere.yaml"], "/nowhere.yaml: cannot be read"),
    ],
)  # fmt: skip
def test_wrong_flags_are_said(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
