"""Usage rows as CSV."""

import csv
import io

import pytest

from gateway.api.admin.usage import Sum
from gateway.usage.rows import DIMENSIONS, SUMS, UsageRow, names, to_csv, usage

NAMES = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1", '=HYPERLINK("http://x")', "=a,b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_a_spreadsheet_would_read_as_a_formula_is_escaped(name: str) -> None:
    row = {"key": name, "name": name, "model": name, "requests": -1, "finished": 0}
    row |= {"tokens_in": 0, "tokens_out": 0, "cached": 0, "counted": 0}
    text = to_csv(["key", "model"], [row])
    assert f"'{name[:1]}" in text
    if "\r" in name:
        return  # a reader would see two lines
    (line,) = csv.DictReader(io.StringIO(text, newline=""))
    assert line["key"] == line["name"] == line["model"] == "'" + name
    assert line["requests"] == "-1"


def test_other_names_are_not_changed_in_csv() -> None:
    row = {"model": "a=b-c+d@e", "requests": 1, "finished": 0, "tokens_in": 0, "tokens_out": 0, "cached": 0}
    assert "a=b-c+d@e,1" in to_csv(["model"], [row | {"counted": 0}])


def test_the_admin_api_answers_with_every_sum_and_every_dimension() -> None:
    assert list(Sum.model_fields) == [*names(DIMENSIONS), *SUMS]


def test_a_backup_has_every_column() -> None:
    assert list(UsageRow.model_fields) == usage.c.keys()
