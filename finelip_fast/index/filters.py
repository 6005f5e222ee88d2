"""Compile ``where`` expressions on an item's metadata to SQL conditions.

    camera = 'X100' and not (place.city in ('Łódź', 'Lima') or "shot at" is null) and rating between 3 and 5

Grammar; keywords are case-insensitive::

    where      = comparison | not where | where and where | where or where | (where)    binding in this order
    comparison = field (= | == | != | <> | < | <= | > | >=) value
               | field [not] in (value, ...)  |  field [not] between value and value
               | field [not] like 'pattern'   |  field is [not] null
    field      = name, place.city in nested objects, "any name" without a double quote (case matters);
                 id is the item's own id, "id" a field of the metadata
    value      = 'text', with '' for a single quote in it; a number; true; false

SQLite evaluates expressions; each is true or false, never unknown:

* A comparison is false if the field is missing, null, or of a different type from the value. This includes
  ``camera != 'a'`` and ``camera not in ('a')``. The types are text, numbers and booleans; lists and objects equal nothing.
* ``not x`` is true exactly if ``x`` is not: ``not camera = 'a'`` is true if there is no camera.
* ``x is null`` is true if x is missing or null.
* ``x in (1, 'a')`` and ``x not in (1, 'a')`` compare only with values of x's type, so both are false for a boolean.
* Text is ordered by code point, false comes before true, and numbers compare as numbers: 1 = 1.0. Integers beyond 64 bits
  are floats.
* ``like`` is SQLite's: ``%`` matches any text, ``_`` any one character, and A to Z match a to z.

To stay within SQLite's limits, an expression has at most 1,000,000 characters, 50 nested parentheses, 200 comparisons and
32,000 values. A field has at most 64 names with 1,000 characters in total. A pattern of ``like`` has at most 1,000 bytes and
32 ``%``, so that one comparison ends soon.
Older versions of SQLite read text in the metadata only up to its first NUL, and some read floats with many digits and an
extreme exponent one digit off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from finelip_fast.errors import InputError

_DEEPEST = 50  # SQLite before 3.46 has a parser stack of 100, and the surrounding query needs some of it
_LONGEST = 200  # comparisons: a chain of ands is as deep as it is long, and SQLite's limit is 1,000 for the whole query
_MOST_VALUES = 32_000  # SQLite binds at most 32,766, and the surrounding query needs some of them
_LONGEST_PATTERN, _MOST_WILDCARDS = 1000, 32  # bytes and % of like, whose time grows with pattern times text
# Characters; SQLite accepts 1,000,000 bytes, including the surrounding query.
_LONGEST_TEXT, _LONGEST_SQL = 1_000_000, 950_000
_LONGEST_FIELD, _MOST_NAMES = 1000, 64

_TOKEN = re.compile(
    r"""\s* (?:
      (?P<field>  (?: [^\W\d]\w* | "[^"]*" ) (?: \. (?: [^\W\d]\w* | "[^"]*" ) )* )
    | (?P<number> [+-]? (?: [0-9]+ (?: \.[0-9]* )? | \.[0-9]+ ) (?: [eE][+-]?[0-9]+ )? (?![\w.]) )
    | (?P<text>   ' (?: [^'] | '' )* ' (?!') )
    | (?P<sign>   == | != | <> | <= | >= | [=<>(),] )
    | (?P<end>    \Z )
    | (?P<unknown> \S+ )
    )""",
    re.VERBOSE,
)
_PLAIN_NAME = re.compile(r"[^\W\d]\w*")
_KEYWORDS = {"or", "and", "not", "in", "like", "between", "is", "null", "true", "false"}
_OPERATORS = {"=": "=", "==": "=", "!=": "<>", "<>": "<>", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
# The json_type of values that each type is compared with: in SQLite itself, true equals 1, and 1 sorts before 'a'.
_JSON_TYPES = {str: "('text')", float: "('integer', 'real')", bool: "('true', 'false')"}


def compile_filter(where: str) -> tuple[str, list[Any]]:
    """Compile an expression to an SQL condition on ``item.id`` and ``item.metadata``, and the values of its placeholders.

    The condition is in parentheses, for the ``WHERE`` clause of a query that names the table ``item``. Metadata must be
    written by :func:`json.dumps`, because names in the condition are escaped the same way. It must not contain NaN or
    infinity, which are not JSON: one such item makes the whole query fail.

    Raises:
        InputError: The expression does not follow the grammar above, or exceeds the limits of SQLite.
    """
    condition = _Parser(where).parse()
    if len(condition.sql) > _LONGEST_SQL:
        raise InputError(
            f"expected a where expression of at most {_LONGEST_SQL} characters as SQL, got {len(condition.sql)}; compare "
            "fewer fields with long names, or split it into several searches"
        )
    return f"({condition.sql})", condition.parameters


def compared_fields(where: str) -> list[str]:
    """Metadata fields in an expression, as it spells them.

    >>> compared_fields("place.city = 'Lima' and id like 'a%'")
    ['place.city']

    Raises:
        InputError: The expression contains something that is no part of any.
    """
    names = (token.text for token in _tokens(where) if token.kind == "field" and token.text != "id")
    return list(dict.fromkeys(names))


def field_expression(field: str) -> str:
    """SQL expression of a metadata field, for ``CREATE INDEX ... ON item (...)``; conditions on the field use that index.

    >>> field_expression("place.city")
    'json_extract(metadata, \\'$."place"."city"\\')'

    Raises:
        InputError: The text is not exactly one field, or is ``id``, which is not part of the metadata.
    """
    if not isinstance(field, str):
        raise InputError(f"expected a field of the metadata, by its name, got {field!r:.80}")
    first, *rest = _tokens(field)
    if first.kind != "field" or len(rest) > 1 or first.text == "id":
        raise InputError(
            f"expected a field of the metadata, got {field!r:.80}; write it as in an expression: camera, place.city or "
            '"any name" (id is the id of the item, "id" a field of the metadata)'
        )
    return f"json_extract(metadata, {_path(first.text)})"


def field_name(names: Sequence[str]) -> str | None:
    """The name of a field in expressions, from its names in nested objects; None: no expression can name it.

    >>> field_name(["place", "shot at"])
    'place."shot at"'
    """
    if any('"' in name for name in names) or len(names) > _MOST_NAMES:
        return None
    plain = [name if _PLAIN_NAME.fullmatch(name) else f'"{name}"' for name in names]
    if len(plain) == 1 and plain[0].lower() in {*_KEYWORDS, "id"}:
        plain = [f'"{names[0]}"']
    field = ".".join(plain)
    # The limits of _tokens, counted in the same way.
    return field if len(field) <= _LONGEST_FIELD and field.count(".") < _MOST_NAMES else None


class _Token(NamedTuple):
    kind: str  # field, number, text, end; a keyword or a sign is its own kind
    text: str
    column: int


def _tokens(where: str) -> Iterator[_Token]:
    """Yield the tokens of an expression; the last one is ``end``."""
    if not isinstance(where, str):
        raise InputError(
            f"expected a where expression as a str, got {type(where).__name__}; write e.g. \"camera = 'X100'\""
        )
    if len(where) > _LONGEST_TEXT:
        raise InputError(
            f"expected a where expression of at most {_LONGEST_TEXT} characters, got {len(where)}; "
            "split it into several searches"
        )
    for match in _TOKEN.finditer(where):
        kind = str(match.lastgroup)
        text, column = match[kind], match.start(kind) + 1
        if kind == "unknown":
            raise _error(
                "a field, an operator or a value",
                _Token(kind, text, column),
                "write texts in 'single quotes', with '' for a quote inside, and fields with characters other than letters, "
                'digits and _ in "double quotes"',
            )
        if kind == "field" and (len(text) > _LONGEST_FIELD or text.count(".") >= _MOST_NAMES):
            limit = f"a field of at most {_MOST_NAMES} names and {_LONGEST_FIELD} characters"
            raise _error(
                limit, _Token(kind, text, column), "write texts in 'single quotes'; metadata cannot be nested deeper"
            )
        yield _Token(text.lower() if kind == "sign" or text.lower() in _KEYWORDS else kind, text, column)
        if kind == "end":  # trailing blanks would give a second one
            return


def _error(expected: str, got: _Token, remedy: str) -> InputError:
    token = "the end" if got.kind == "end" else repr(got.text if len(got.text) <= 40 else got.text[:40] + "…")
    return InputError(f"expected {expected}, got {token} at column {got.column} of the where expression; {remedy}")


def _path(field: str) -> str:
    """The JSON path of a field as an SQL literal: SQLite matches indexes by it, so it cannot be a parameter.

    Names are escaped as in the JSON, because SQLite before 3.45 compares them without unescaping.
    """
    names = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|([^".]+)', field)]
    path = "".join("." + json.dumps(name) for name in names).replace("'", "''")
    return f"'${path}'"


def _column(field: str) -> str:
    return "item.id" if field == "id" else f"json_extract(item.metadata, {_path(field)})"


class _Condition(NamedTuple):
    sql: str  # can be combined by AND as it is
    parameters: list[Any]
    depth: int = 0  # of parentheses around comparisons


def _compare(field: str, operator: str, values: list[Any]) -> _Condition:
    """Build one comparison with values of one type, and the test that the field is of that type."""
    kind = _kind(values[0])
    # Bytes, not str: sqlite3 rejects lone surrogates, which ids of pictures may contain. CAST alone would give TEXT affinity,
    # which no index on an expression has; the unary + removes it.
    places = ["+CAST(? AS TEXT)" if kind is str else "?" for _ in values]
    operands = places[0]
    if operator.endswith("IN"):
        operands = f"({', '.join(places)})"
    elif operator.endswith("BETWEEN"):
        operands = " AND ".join(places)
    guard = f"json_type(item.metadata, {_path(field)}) IN {_JSON_TYPES[kind]}"
    if field == "id":
        guard = "1" if kind is str else "0"
    parameters = [value.encode("utf-8", "surrogatepass") if kind is str else value for value in values]
    return _Condition(f"({_column(field)} {operator} {operands} AND {guard})", parameters)


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)


def _join(word: str, terms: list[_Condition]) -> _Condition:
    if len(terms) == 1:
        return terms[0]
    # Deepest first: what precedes a parenthesis stays on the stack of SQLite's parser while it parses the inside.
    terms = sorted(terms, key=lambda term: -term.depth)
    sql = f" {word} ".join(term.sql for term in terms)
    parameters = [parameter for term in terms for parameter in term.parameters]
    if word == "AND":
        return _Condition(sql, parameters, terms[0].depth)
    return _Condition(f"({sql})", parameters, terms[0].depth + 1)


class _Parser:
    """Recursive-descent parser. ``inverse`` says whether an odd number of nots applies: a not reaches the SQL only around
    single comparisons, because ``not (a and b)`` becomes ``not a or not b``.
    """

    def __init__(self, where: str) -> None:
        self._tokens = list(_tokens(where))
        self._at = self._depth = self._comparisons = self._values = 0

    def parse(self) -> _Condition:
        condition = self._disjunction(False)
        self._expect("end", "'and', 'or' or the end", "join comparisons with 'and' or 'or', and check the parentheses")
        return condition

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self, *kinds: str) -> _Token | None:
        """Consume and return the next token if it is of one of these kinds; otherwise leave it and return None."""
        token = self._next
        if token.kind not in kinds:
            return None
        self._at += 1
        return token

    def _expect(self, kind: str, expected: str, remedy: str) -> _Token:
        token = self._take(kind)
        if token is None:
            raise _error(expected, self._next, remedy)
        return token

    def _disjunction(self, inverse: bool) -> _Condition:
        return self._chain("or", self._conjunction, inverse)

    def _conjunction(self, inverse: bool) -> _Condition:
        return self._chain("and", self._single, inverse)

    def _chain(self, word: str, below: Callable[[bool], _Condition], inverse: bool) -> _Condition:
        terms = [below(inverse)]
        while self._take(word):
            terms.append(below(inverse))
        return _join("OR" if (word == "or") != inverse else "AND", terms)

    def _single(self, inverse: bool) -> _Condition:
        while self._take("not"):
            inverse = not inverse
        opened = self._take("(")
        if opened:
            self._depth += 1
            if self._depth > _DEEPEST:
                raise _error(f"parentheses at most {_DEEPEST} deep", opened, "nest fewer of them")
            condition = self._disjunction(inverse)
            self._expect(")", ")", f"close the parenthesis at column {opened.column}")
            self._depth -= 1
            return condition
        condition = self._comparison()
        return condition._replace(sql=f"({condition.sql} IS NOT TRUE)") if inverse else condition

    def _comparison(self) -> _Condition:
        token = self._expect("field", "a field", "a comparison begins with a field: camera = 'X100'")
        self._comparisons += 1
        if self._comparisons > _LONGEST:
            raise _error(f"at most {_LONGEST} comparisons", token, "combine values of a field: field in (value, ...)")
        field = token.text
        if sign := self._take(*_OPERATORS):
            return _compare(field, _OPERATORS[sign.kind], [self._value()])
        if self._take("is"):
            negation = "NOT " if self._take("not") else ""
            self._expect("null", "null", "compare with other values by =")
            return _Condition(f"({_column(field)} IS {negation}NULL)", [])
        negation = "NOT " if self._take("not") else ""
        if self._take("in"):
            values = self._list()
            groups = [[value for value in values if _kind(value) is kind] for kind in _JSON_TYPES]
            return _join("OR", [_compare(field, f"{negation}IN", group) for group in groups if group])
        if self._take("like"):
            return _compare(field, f"{negation}LIKE", [self._pattern()])
        if self._take("between"):
            ends = [self._value()]
            self._expect("and", "and", "write a range as: field between 1 and 5")
            token = self._next
            ends.append(self._value())
            if _kind(ends[0]) is not _kind(ends[1]):
                raise _error(
                    "two ends of the same type", token, "write two numbers or two texts: field between 1 and 5"
                )
            return _compare(field, f"{negation}BETWEEN", ends)
        expected = "in, like or between after not" if negation else "an operator after the field"
        raise _error(
            expected, self._next, "the operators are = != < <= > >=, [not] in, like, between, and is [not] null"
        )

    def _list(self) -> list[Any]:
        remedy = "write a list as (value, value, ...)"
        self._expect("(", "( after in", remedy)
        values = [self._value()]
        while self._take(","):
            values.append(self._value())
        self._expect(")", ", or )", remedy)
        return values

    def _pattern(self) -> str:
        token, pattern = self._next, self._value()
        if not isinstance(pattern, str) or len(pattern.encode("utf-8", "surrogatepass")) > _LONGEST_PATTERN:
            raise _error(f"a 'pattern' of at most {_LONGEST_PATTERN} bytes", token, "write a text, as in like 'X1%'")
        if pattern.count("%") > _MOST_WILDCARDS:
            raise _error(
                f"a 'pattern' with at most {_MOST_WILDCARDS} %", token, "write a simpler pattern, as in like 'X1%'"
            )
        return pattern

    def _value(self) -> Any:
        token = self._take("text", "number", "true", "false")
        if token is None:
            remedy = "write a 'text' in single quotes, a number, true or false; for missing values use: field is null"
            raise _error("a value", self._next, remedy)
        self._values += 1
        if self._values > _MOST_VALUES:
            raise _error(f"at most {_MOST_VALUES} values", token, "split it into several searches")
        if token.kind == "text":
            return token.text[1:-1].replace("''", "'")
        if token.kind != "number":
            return token.kind == "true"
        # Longer ones exceed 64 bits, and Python refuses to parse thousands of digits.
        if len(token.text) <= 20 and token.text.lstrip("+-").isdigit() and -(2**63) <= int(token.text) < 2**63:
            return int(token.text)
        return float(token.text)
