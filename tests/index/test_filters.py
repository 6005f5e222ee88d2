"""Where expressions: SQLite finds the right items for any metadata, using an index if there is one."""

from __future__ import annotations

import doctest
import importlib
import json
import operator
import os
import random
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.errors import InputError
from finelip_fast.index.filters import compile_filter, field_expression


@pytest.fixture
def database() -> Iterator[sqlite3.Connection]:
    with opened() as connection:
        yield connection


def opened() -> closing[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    connection.text_factory = lambda raw: raw.decode("utf-8", "surrogatepass")
    connection.execute(
        "CREATE TABLE item "
        "(position INTEGER PRIMARY KEY, id TEXT NOT NULL, metadata TEXT NOT NULL, born INTEGER, died INTEGER) STRICT"
    )
    return closing(connection)


def fill(database: sqlite3.Connection, items: dict[str, dict[str, Any]]) -> None:
    rows = [(name.encode("utf-8", "surrogatepass"), json.dumps(metadata)) for name, metadata in items.items()]
    database.executemany("INSERT INTO item (id, metadata) VALUES (CAST(? AS TEXT), ?)", rows)


def matching_ids(database: sqlite3.Connection, where: str) -> list[str]:
    condition, parameters = compile_filter(where)
    rows = database.execute(f"SELECT id FROM item WHERE {condition} ORDER BY position", parameters)
    return [name for (name,) in rows]


# By hand --------------------------------------------------------------------------------------------------------------

ITEMS: dict[str, dict[str, Any]] = {
    "text": {"x": "b", "place": {"city": "Łódź"}, "place.city": "flat"},
    "upper": {"x": "B", "flag": True},
    "one": {"x": 1, "flag": False},
    "float": {"x": 2.5, "flag": 1},
    "big": {"x": 10**30},
    "true": {"x": True, "flag": "true"},
    "list": {"x": ["b"], "place": ["city"]},
    "object": {"x": {"b": 1}},
    "null": {"x": None},
    "missing": {},
    "quotes": {"x": 'it\'s "b"', "it's": 3, "id": "inside", "é\\\t": 4, "and": 5, "": 6},
    "caf\udce9.jpg": {"x": "caf\udce9", "caf\udce9": 7, "🏠": {"猫": 8}},
}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("x = 'b'", "text"),
        ("x == 'b' or x<>'b'", "text upper quotes caf\udce9.jpg"),
        ("x != 'b'", "upper quotes caf\udce9.jpg"),
        ("x < 'b'", "upper"),
        ("x <= 'b'", "text upper"),
        ("x > 'b' AND x >= 'ib'", "quotes"),
        ("x = 1", "one"),
        ("x = 1.0", "one"),
        ("x=+1.e0", "one"),
        ("x != 1", "float big"),
        ("x > -1.5e-3", "one float big"),
        ("x < .5", ""),
        (f"x = {10**30}", "big"),
        (f"x < {'9' * 5000}", "one float big"),
        (f"x > -{'9' * 5000}", "one float big"),
        (f"x = {'0' * 5000}1", "one"),
        ("flag = true", "upper"),
        ("flag = FALSE", "one"),
        ("flag >= false", "upper one"),
        ("flag = 1", "float"),
        ("flag = 'true'", "true"),
        ("x = '1'", ""),
        ("x = '[\"b\"]'", ""),
        ("x in ('b', 1, true)", "text one true"),
        ("x not in ('b', 1)", "upper float big quotes caf\udce9.jpg"),
        ("x NOT IN (true)", ""),
        ("x like 'B'", "text upper"),
        ("x like '%''s _b_'", "quotes"),
        ("x not like 'b'", "quotes caf\udce9.jpg"),
        ("place.city like 'łÓDŹ'", ""),
        ("place.city like 'ŁóD_'", "text"),
        ("x between 1 and 2.5", "one float"),
        ("x not between 1 and 2.5", "big"),
        ("x between 'a' and 'c' and x != 'caf\udce9'", "text"),
        ("x is null", "null missing"),
        ("not x is not null", "null missing"),
        ("x Is Not Null and not x != 'b' and not x = 'b'", "one float big true list object"),
        ("not x = 'b' and flag is null", "big list object null missing quotes caf\udce9.jpg"),
        ("not (x = 'b' or not (x in ('B', 1) and not flag = true))", "one"),
        ("not not x = 1", "one"),
        ("x = 1 or x = 2.5 and flag = 7", "one"),
        ("(x = 1 or x = 2.5) and flag = 1", "float"),
        ("not x = 1 and x = 2.5", "float"),
        ("place.city = 'Łódź'", "text"),
        ("\"place.city\" = 'flat'", "text"),
        ('"place"."city" = \'Łódź\'', "text"),
        ("place.city is null and place is not null", "list"),
        ("x = 'it''s \"b\"'", "quotes"),
        ('"it\'s" = 3 and "é\\\t" = 4 and "and" = 5 and "" = 6', "quotes"),
        ("\"id\" = 'inside'", "quotes"),
        ("id = 'one' or id.x = 1", "one"),
        ("id in ('one', 1, 'two')", "one"),
        ("id != 1 or id = true or id is null", ""),
        ("id like '_L%'", "float"),
        ("id = 'caf\udce9.jpg' and x = 'caf\udce9'", "caf\udce9.jpg"),
        ('"caf\udce9" = 7 and 🏠.猫 = 8'.replace("🏠", '"🏠"'), "caf\udce9.jpg"),
        ("\n\tx\n=\n1 ", "one"),
        ("not(x!=1)and(x=1)", "one"),
        ("X = 1", ""),
    ],
)
def test_finds(database: sqlite3.Connection, where: str, expected: str) -> None:
    fill(database, ITEMS)
    assert matching_ids(database, where) == expected.split()


def test_exact_integers(database: sqlite3.Connection) -> None:
    top = 2**63 - 1
    fill(database, {"top": {"x": top}, "below": {"x": top - 1}, "above": {"x": 1 - 2**63}, "bottom": {"x": -(2**63)}})
    assert matching_ids(database, f"x = {top}") == ["top"]
    assert matching_ids(database, f"x < {top}") == ["below", "above", "bottom"]
    assert matching_ids(database, f"x = {1 - 2**63}") == ["above"]
    assert matching_ids(database, f"x = {-(2**63)}") == ["bottom"]


def test_a_condition_has_the_paths_in_it_and_the_values_beside_it() -> None:
    condition, parameters = compile_filter("flag = true and (id like 'é''%' or it.s in ('a', 'b', -1.5))")
    path = '\'$."it"."s"\''
    assert condition == (
        f"((((json_extract(item.metadata, {path}) IN (+CAST(? AS TEXT), +CAST(? AS TEXT))"
        f" AND json_type(item.metadata, {path}) IN ('text'))"
        f" OR (json_extract(item.metadata, {path}) IN (?)"
        f" AND json_type(item.metadata, {path}) IN ('integer', 'real')))"
        " OR (item.id LIKE +CAST(? AS TEXT) AND 1))"
        " AND (json_extract(item.metadata, '$.\"flag\"') = ?"
        " AND json_type(item.metadata, '$.\"flag\"') IN ('true', 'false')))"
    )
    assert parameters == [b"a", b"b", -1.5, "é'%".encode(), True]


@pytest.mark.parametrize(
    "evil",
    [
        "') OR 1=1 --",
        "'; DROP TABLE item; --",
        "\\",
        '\\"',
        "$.x",
        "' || '",
        "%",
        "?",
        ":now",
        "a[0]",
        "#-1",
        "a\0b",
        "*",
    ],
)
def test_nothing_gets_out_of_its_quotes(database: sqlite3.Connection, evil: str) -> None:
    text = "'" + evil.replace("'", "''") + "'"
    key = evil.replace('"', "")
    fill(database, {"other": {"x": "other", "other": 1}, evil: {"x": evil.replace("\0", ""), key: 1}})
    assert matching_ids(database, f"id = {text}") == [evil]
    assert matching_ids(database, f"x = {text}".replace("\0", "")) == [evil]
    assert matching_ids(database, f"id <> {text}") == ["other"]
    assert matching_ids(database, f'"{key}" = 1') == [evil]
    database.execute(f"""CREATE INDEX by_key ON item ({field_expression(f'"{key}"')})""")
    assert matching_ids(database, f'"{key}" = 1') == [evil]


# Against a reading of the same tree in Python -------------------------------------------------------------------------

NAMES = ["a", "b", "id", "é", "it's", "a.b", "and", "\\"]
FIELDS = st.sampled_from([(), *((name,) for name in NAMES), ("a", "b"), ("a", "a.b", "id"), ("id", "é")])  # (): the id
TEXTS = st.text("aAbB%_é猫🏠 '\"\\\n.1\udce9", max_size=3)
NUMBERS = (
    st.integers(-2, 2)
    | st.sampled_from([2**63 - 1, 2**63, -(2**63), 10**30])
    | st.sampled_from([-0.0, 0.5, 1.0, 2.0**63])
) | st.floats(-1e6, 1e6).map(lambda number: round(number, 3))
VALUES = TEXTS | NUMBERS | st.booleans()
METADATA = st.dictionaries(
    st.sampled_from(NAMES),
    st.recursive(
        VALUES | st.none(), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner)
    ),
)
ORDERS = {"=": operator.eq, "==": operator.eq, "!=": operator.ne, "<>": operator.ne} | {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge
}  # fmt: skip
ENDS = st.tuples(TEXTS, TEXTS) | st.tuples(NUMBERS, NUMBERS) | st.tuples(st.booleans(), st.booleans())
COMPARISONS = (
    st.tuples(st.sampled_from(list(ORDERS)), FIELDS, VALUES)
    | st.tuples(st.sampled_from(["in", "not in"]), FIELDS, st.lists(VALUES, min_size=1, max_size=4))
    | st.tuples(st.sampled_from(["between", "not between"]), FIELDS, ENDS)
    | st.tuples(st.sampled_from(["like", "not like"]), FIELDS, TEXTS)
    | st.tuples(st.sampled_from(["is null", "is not null"]), FIELDS, st.none())
)
TREES = st.recursive(
    COMPARISONS,
    lambda inner: (
        st.tuples(st.sampled_from(["and", "or"]), st.lists(inner, min_size=2, max_size=3))
        | st.tuples(st.just("not"), inner)
    ),
    max_leaves=8,
)


def as_expression(tree: Any, chance: random.Random) -> str:
    """Format the tree as an expression, with necessary and occasionally unnecessary parentheses."""
    word = "".join(chance.choice([letter.upper(), letter]) for letter in tree[0])
    if tree[0] in ("and", "or"):
        text = f" {word}\n".join(
            f"({as_expression(term, chance)})" if term[0] in ("and", "or") else as_expression(term, chance)
            for term in tree[1]
        )
    elif tree[0] == "not":
        inner = as_expression(tree[1], chance)
        text = f"{word} ({inner})" if tree[1][0] in ("and", "or") else f"{word} {inner}"
    else:
        _, path, value = tree
        names = [
            name if re.fullmatch(r"a|b|é|id", name) and (path[1:] or name != "id") else f'"{name}"' for name in path
        ]
        text = f"{'.'.join(names) or 'id'} {word} "
        if "in" in tree[0]:
            text += f"({', '.join(literal(operand) for operand in value)})"
        elif "between" in tree[0]:
            text += f"{literal(value[0])} AnD {literal(value[1])}"
        elif value is not None:
            text += literal(value)
    return f"( {text})" if chance.random() < 0.2 else text


def literal(value: Any) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def holds(tree: Any, item: str, metadata: dict[str, Any]) -> bool:
    word, rest = tree[0], tree[1:]
    if word == "not":
        return not holds(rest[0], item, metadata)
    if word in ("and", "or"):
        return {"and": all, "or": any}[word](holds(term, item, metadata) for term in rest[0])
    path, value = rest
    field: Any = metadata if path else item
    for name in path:
        field = field.get(name) if isinstance(field, dict) else None
    if word.startswith("is"):
        return (field is None) == (word == "is null")
    values = [plain(operand) for operand in (value if isinstance(value, (list, tuple)) else [value])]
    field, values = plain(field), [operand for operand in values if kind(operand) == kind(plain(field))]
    if not values:
        return False
    if word in ORDERS:
        return ORDERS[word](field, values[0])
    if "between" in word:
        answer = values[0] <= field <= values[1]
    elif "like" in word:
        pattern = "".join({"%": ".*", "_": "."}.get(letter, re.escape(letter)) for letter in values[0])
        answer = re.fullmatch(pattern, field, re.ASCII | re.IGNORECASE | re.DOTALL) is not None
    else:
        answer = field in values
    return answer != word.startswith("not")


def plain(value: Any) -> Any:
    return float(value) if type(value) is int and not -(2**63) <= value < 2**63 else value


def kind(value: Any) -> str:
    return {str: "text", bool: "boolean", int: "number", float: "number"}.get(type(value), "none")


@settings(max_examples=200, deadline=None)
@given(TREES, st.dictionaries(TEXTS, METADATA, min_size=1, max_size=4), st.sets(FIELDS), st.integers(0, 2**32))
def test_finds_what_python_finds(
    tree: Any, items: dict[str, dict[str, Any]], indexed: set[tuple[str, ...]], seed: int
) -> None:
    with opened() as database:
        fill(database, items)
        for number, path in enumerate(indexed - {()}):
            expression = field_expression(".".join(f'"{name}"' for name in path))
            database.execute(f"CREATE INDEX by_{number} ON item ({expression})")
        expected = [item for item, metadata in items.items() if holds(tree, item, metadata)]
        assert matching_ids(database, as_expression(tree, random.Random(seed))) == expected


WORDS = [
    *"()=<>,.'%_+-",
    "x",
    "y.z",
    '"a b"',
    "'t'",
    "''",
    "in",
    "like",
    "between",
    "is",
    "null",
    "not",
    "and",
    "or",
    "1",
    "1.5e9",
    "e",
]


@settings(max_examples=int(os.environ.get("FINELIP_FUZZ", 100)), deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from([1, 1, 1, 3, 3000])), max_size=12),
    st.sampled_from(["", " "]),
)
def test_any_text_is_refused_or_evaluated_soon(parts: list[tuple[str, int]], between: str) -> None:
    where = between.join(word * times for word, times in parts)
    begun = time.process_time()
    with opened() as database:
        fill(database, ITEMS)
        with suppress(InputError):
            condition, parameters = compile_filter(where)
            database.execute(f"SELECT id FROM item WHERE {condition}", parameters).fetchall()
    assert time.process_time() - begun < 20  # quadratic time would take minutes


# Indexes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query",
    [
        "SELECT id FROM item WHERE {}",
        "SELECT id FROM item WHERE born <= 3 AND (died IS NULL OR died > 3) AND {}",
        "SELECT note.metadata FROM note JOIN item ON item.id = note.item WHERE {}",
        "SELECT * FROM note WHERE note.item IN (SELECT id FROM item WHERE {})",
    ],
    ids=["alone", "among others", "join", "subquery"],
)
@pytest.mark.parametrize(
    ("field", "where", "use"),
    [
        ("camera", "camera = 'a'", "=?"),
        ("camera", "flag = true and (camera = 1 and x like 'b%')", "=?"),
        ("camera", "camera in ('a', 'b')", "=?"),
        ("camera", "camera in ('a', 1)", "=?"),
        ("camera", "camera < 'b' and not x = 1", "<?"),
        ("camera", "x = 1 and camera >= 3", ">?"),
        ("camera", "camera between 3 and 5", ">? AND <expr><?"),
        ("camera", "camera is null", "=?"),
        ("flag", "flag = true", "=?"),
        ("place.city", "\"place\".city = 'a'", "=?"),
        ('"it\'s \\ é"', '"it\'s \\ é" = 1', "=?"),
    ],
)
def test_an_index_on_the_field_is_used(
    database: sqlite3.Connection, query: str, field: str, where: str, use: str
) -> None:
    database.execute("CREATE TABLE note (item TEXT, metadata TEXT)")
    database.execute(f"CREATE INDEX by_field ON item ({field_expression(field)})")
    condition, parameters = compile_filter(where)
    plan = database.execute("EXPLAIN QUERY PLAN " + query.format(condition), parameters).fetchall()
    assert f"SEARCH item USING INDEX by_field (<expr>{use})" in [detail for *_, detail in plan]


def test_the_documentation_computes() -> None:
    results = doctest.testmod(importlib.import_module("finelip_fast.index.filters"))
    assert results.attempted
    assert not results.failed


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "",
            "expected a field, got the end at column 1 of the where expression; a comparison begins with a field: camera",
        ),
        (" \n\t", "expected a field, got the end at column 4"),
        ("x = $5", "expected a field, an operator or a value, got '$5' at column 5"),
        ("x = 5mm and y = 1", "got '5mm' at column 5"),
        ("x = 1.2.3", "got '1.2.3' at column 5"),
        ("x. = 1", "got '.' at column 2"),
        (
            "focal-length = 1",
            "got '-length' at column 6 of the where expression; write texts in 'single quotes', with ''",
        ),
        ("x = 'it's'", 'an operator or a value, got "\'" at column 10'),
        ("x = 'it''s", "got \"'it''s\" at column 5"),
        ('"x = 1', "got '\"x' at column 1"),
        ("x; DROP TABLE item", "got ';' at column 2"),
        ("5 = x", "expected a field, got '5' at column 1"),
        ("'a' = x", "expected a field, got \"'a'\" at column 1"),
        ("true", "expected a field, got 'true' at column 1"),
        ("x = 1 and", "expected a field, got the end at column 10"),
        ("x = 1 and or y = 2", "expected a field, got 'or' at column 11"),
        ("()", "expected a field, got ')' at column 2"),
        (
            "x",
            "expected an operator after the field, got the end at column 2 of the where expression; the operators are",
        ),
        ("x 5", "expected an operator after the field, got '5' at column 3"),
        ("x not 5", "expected in, like or between after not, got '5' at column 7"),
        ("x =", "expected a value, got the end at column 4 of the where expression; write a 'text' in single quotes"),
        ("x = y", "expected a value, got 'y' at column 5"),
        ('x = "y"', "expected a value, got '\"y\"' at column 5"),
        ("x != null", "expected a value, got 'null' at column 6"),
        ("x = = 1", "expected a value, got '=' at column 5"),
        (f"x = {'y' * 99}", f"expected a value, got '{'y' * 40}…' at column 5"),
        (
            "x is true",
            "expected null, got 'true' at column 6 of the where expression; compare with other values by =",
        ),
        ("x in 1", "expected ( after in, got '1' at column 6"),
        ("x in ()", "expected a value, got ')' at column 7"),
        ("x in (1 2)", "expected , or ), got '2' at column 9"),
        ("x in (1,", "expected a value, got the end at column 9"),
        ("x like 5", "expected a 'pattern' of at most 1000 bytes, got '5' at column 8"),
        (f"x like '{'é' * 501}'", f"expected a 'pattern' of at most 1000 bytes, got \"'{'é' * 39}…\" at column 8"),
        (f"x like '{'%a' * 33}'", f"expected a 'pattern' with at most 32 %, got \"'{'%a' * 19}%…\" at column 8"),
        (f"x like '{'%a' * 500}'", f"expected a 'pattern' with at most 32 %, got \"'{'%a' * 19}%…\" at column 8"),
        (f"n = {'1' * 40_000}x", f"got '{'1' * 40}…' at column 5"),
        (f"{'n' * 1001} = 1", "expected a field of at most 64 names and 1000 characters"),
        (f"{'.'.join('n' * 65)} = 1", "expected a field of at most 64 names and 1000 characters"),
        (f"x = '{'y' * 1_000_000}'", "expected a where expression of at most 1000000 characters, got 1000006"),
        (
            " or ".join([f"{'é' * 1000} in (1, 'a', true)"] * 200),
            "as SQL, got 7",
        ),
        ("x between 1", "expected and, got the end at column 12"),
        ("x between 1 and 'a'", "expected two ends of the same type, got \"'a'\" at column 17"),
        ("x between 1 and true", "expected two ends of the same type, got 'true' at column 17"),
        (
            "(x = 1 or (y = 2)",
            "expected ), got the end at column 18 of the where expression; close the parenthesis at column 1",
        ),
        ("x = 1)", "expected 'and', 'or' or the end, got ')' at column 6"),
        ("x = 1 y = 2", "expected 'and', 'or' or the end, got 'y' at column 7"),
        ("x like 'a' escape 'b'", "expected 'and', 'or' or the end, got 'escape' at column 12"),
        ("(" * 9_999, "expected parentheses at most 50 deep, got '(' at column 51"),
        (
            " or ".join(["x = 1"] * 201),
            "expected at most 200 comparisons, got 'x' at column 1801 of the where expression; combine values",
        ),
        (f"x in ({'1,' * 40_000} 1)", "expected at most 32000 values, got '1' at column 64007"),
    ],
)
def test_refuses(where: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        compile_filter(where)


def test_refuses_what_is_no_text() -> None:
    with pytest.raises(InputError, match="expected a where expression as a str, got NoneType; write"):
        compile_filter(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a field of the metadata, by its name, got None"):
        field_expression(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["", " ", "a b", "id", "a =", "'a'", "5", "null", "a, b", "(a)"])
def test_an_index_is_of_one_field(field: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"expected a field of the metadata, got {field!r}; write it as in")):
        field_expression(field)


def nested(depth: int, *around: str, core: str = "x = 1") -> str:
    for level in range(depth):
        core = around[level % len(around)].format(core)
    return core


@pytest.mark.parametrize(
    "where",
    [
        nested(50, "({})"),
        nested(50, "x = 2 or x = 1 and ({})"),
        nested(50, "({}) and x = 1 or x = 2"),
        nested(50, "not x = 1 or not ({})", "x = 1 and not not not ({})"),
        nested(44, "x = 2 or x = 1 and ({})", core=nested(6, "({0}) or ({0})", "({0}) and ({0})")),
        " and ".join(["not x != 1"] * 200),
        " or ".join(["x in (2, 'a', true)"] * 199 + ["x = 1"]),
        "x in (1" + ", true, 2" * 15_999 + ")",
        "not id in (1" + ", 'a', 2" * 15_999 + ")",
        f"not x like '{'%' * 32}{'_' * 968}'",
    ],
    ids=["parentheses", "right", "left", "not", "bushy", "and", "or", "in", "ids", "like"],
)
def test_sqlite_takes_what_is_not_refused(database: sqlite3.Connection, where: str) -> None:
    if hasattr(database, "setlimit"):  # Python 3.11
        database.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 32_766)
    fill(database, {"one": {"x": 1}})
    condition, parameters = compile_filter(where)
    # Use it inside a query that needs some stack of its own.
    query = (
        "SELECT item.id FROM item WHERE position >= 0 AND (metadata IS NULL OR position < 9) "
        f"AND EXISTS (SELECT 1 FROM item JOIN item AS other USING (position) WHERE other.id > '' AND {condition})"
    )
    assert database.execute(query, parameters).fetchall() == [("one",)]
