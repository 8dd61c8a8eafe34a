"""Step-time models in files: what is written is read again, and what is no profile is refused in words."""

import re
from pathlib import Path

import pytest

from minserve.step_profile import COLUMNS, Measured, Profile, read_costs, read_profile, write_costs
from sched.latency import StepCost
from sched.step_time import Fitted, decode_point, error_of, prefill_point

COST = StepCost(
    base_s=0.004, per_decode_s=1e-4, per_prefill_token_s=3e-5, per_context_token_s=2e-8, per_pair_s=1e-9,
    rows=((1.0, 0.002), (4.0, 0.0)),
)  # fmt: skip


def test_a_profile_comes_back_as_it_was(tmp_path: Path) -> None:
    slow = {("decode", "prefill"): 0.25, ("prefill", "decode"): 0.5}
    written = Profile({"a": Fitted(COST, 0.03), "b": Fitted(COST, 0.1)}, slow, {"device": "cpu"})
    written.write(tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == written
    assert written.cost_of("b").error == 0.1
    with pytest.raises(ValueError, match="no model 'c'"):
        written.cost_of("c")
    alone = Profile({"a": Fitted(COST, 0.03)}, {}, {})
    assert alone.cost_of("whatever it is called").cost == COST


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        "{}",
        '{"models": {}}',
        '{"models": {"a": {"cost": {"base_s": -1}, "error": 0}}}',
        '{"models": {"a": {"cost": {"seconds": 1}, "error": 0}}}',
        '{"models": {"a": {"cost": {"base_s": 1e300}, "error": 0}}}',
        '{"models": {"a": {"cost": {"base_s": 1, "rows": [[1, 1e300]]}, "error": 0}}}',
        '{"models": ' + 100_000 * "[",
        '{"models": {"a": {"cost": {"base_s": 1}, "error": 0}}, "slowdown": {"decode beside nothing": 1}}',
        '{"models": {"a": {"cost": {"base_s": 1}, "error": 0}}, "slowdown": {"decode beside decode": -1}}',
    ],
)
def test_what_is_no_profile_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=r"p\.json' must be a JSON file of python -m bench.profile_steps"):
        read_profile(tmp_path / "p.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_profile(tmp_path / "gone.json")


def test_a_table_is_written_in_the_form_that_is_read(tmp_path: Path) -> None:
    key, plain = (
        ("llama", "org", "1", "100"),
        StepCost(base_s=0.004, per_decode_s=1e-4, per_prefill_token_s=3e-5),
    )
    rows, points = [], []
    for batch in (1, 2, 4, 8):
        for prompt in (256, 512):
            first, token = prefill_point(batch, prompt, 1.0), decode_point(batch, prompt, 64, 1.0)
            times = first.predicted(plain), token.predicted(plain)
            rows.append(Measured(key, batch, prompt, 64, *times))
            points += [first._replace(seconds=times[0]), token._replace(seconds=times[1])]
    write_costs(tmp_path / "costs.csv", rows)
    head, first_line, *_ = (tmp_path / "costs.csv").read_text().splitlines()
    assert head == (
        "model,qformat,tp,mps_percentage,batch_size,input_len,output_len,seq_len,prefill_time,decode_time,ttft,tpot,e2e"
    )
    assert first_line.startswith("llama,org,1,100,1,256,64,320,")
    found = read_costs(str(tmp_path / "costs.csv"))
    assert list(found) == ["llama/org/1/100"]
    assert error_of(found["llama/org/1/100"].cost, points) < 1e-6


GOOD = dict(zip(COLUMNS, ["m", "org", "1", "100", "4", "256", "64", "320", *5 * ["0.5"]], strict=True))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("batch_size", "0", "row 2: batch_size must be an integer in [1, 65536], got '0'"),
        ("batch_size", "-5", "row 2: batch_size must be an integer in [1, 65536], got '-5'"),
        ("input_len", "9" * 30, "row 2: input_len must be an integer in [1, 16777216], got '9999"),
        ("output_len", "1.5", "row 2: output_len must be an integer"),
        ("tp", "x", "row 2: tp must be an integer in [1, 1024], got 'x'"),
        ("mps_percentage", "0", "row 2: mps_percentage must be an integer in [1, 100], got '0'"),
        ("prefill_time", "nan", "row 2: prefill_time must be seconds in [1e-09, 3600], got 'nan'"),
        ("tpot", "", "row 2: tpot must be seconds in [1e-09, 3600], got ''"),
        ("tpot", "-1", "row 2: tpot must be seconds"),
        ("model", "", "row 2: model must be a name"),
        ("e2e", "9" * 200_000, "cannot be read: field larger than field limit"),
    ],
)
def test_a_row_that_is_wrong_is_named(name: str, value: str, says: str, tmp_path: Path) -> None:
    rows = [",".join(row.values()) for row in (GOOD, GOOD | {name: value})]
    path = tmp_path / "costs.csv"
    path.write_text("\n".join([",".join(COLUMNS), *rows]) + "\n")
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        read_costs(str(path))
    assert str(refused.value).startswith(f"--costs {str(path)!r}")
    path.write_text("\n".join([",".join(COLUMNS), rows[0], "m,org"]) + "\n")
    with pytest.raises(ValueError, match="row 2: tp must be an integer"):
        read_costs(str(path))
    path.write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(ValueError, match="must have a row behind its head, got none"):
        read_costs(str(path))
    path.write_text("\n".join([",".join(COLUMNS), rows[0]]) + "\n")
    assert list(read_costs(str(path))) == ["m/org/1/100"]
