"""Strict JSON: what it reads, and what it refuses."""

import json

import pytest

from saferope_core.concept.strict_json import MAX_DEPTH, depth, dumps, loads


def test_round_trip_with_sorted_keys():
    value = {"b": [1, 2.5, None, True], "a": {"é": 'quote " \\ and [brackets}'}}
    assert loads("text", dumps(value)) == value
    assert loads("text", dumps(value).encode()) == value
    assert dumps({"b": 1, "a": 2}) == dumps({"a": 2, "b": 1}) == '{"a":2,"b":1}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", 0), ("[]", 1), ('{"a": [[]], "b": []}', 3), (r'["[[[", "\"[[[", "\\", []]', 2), ('"[[[', 3)],
)
def test_depth_counts_brackets_outside_of_strings(text, expected):
    assert depth(text) == expected


def test_deepest_allowed_and_one_more():
    assert loads("text", "[" * MAX_DEPTH + "]" * MAX_DEPTH)
    with pytest.raises(ValueError, match="nested 17 deep, expected at most 16"):
        loads("text", "[" * 17 + "]" * 17)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "duplicate keys a"),
        ('[{"a": {"b": 1, "b": 1}}]', "duplicate keys b"),
        ('{"a": NaN}', "NaN, expected finite numbers"),
        ("[-Infinity]", "-Infinity, expected finite"),
        ("[" * 100_000, "nested 100000 deep"),
        ("{'a': 1}", "Expecting property name"),
        ("", "Expecting value"),
        (b"\xff\xfe", "utf-8"),
        ("[1] []", "Extra data"),
    ],
    ids=["duplicate", "duplicate inside", "nan", "infinity", "deep", "quotes", "empty", "bytes", "tail"],
)
def test_everything_else_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=f"geometry: not the JSON expected here: .*{message}"):
        loads("geometry", text)


def test_the_parser_alone_would_have_taken_them():
    assert json.loads('{"a": 1, "a": 2}') == {"a": 2} and json.loads("[NaN]")
