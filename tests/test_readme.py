"""README holds no typed number: its tables are what bench.report draws from bench/results."""

from bench.report import README, TABLES, filled


def test_readme_tables_are_drawn_from_the_results() -> None:
    text = README.read_text()
    assert filled(text) == text, "run `python -m bench.report --write`"
    assert f"<!-- {next(iter(TABLES))} -->" in text, "README has lost its table"
