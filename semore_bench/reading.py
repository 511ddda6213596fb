"""Files that others wrote, read strictly: what is not as expected ends in one line that says where and what."""

import csv
import functools
import io
import json
import math
import re
import stat
import tomllib
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from semore_bench.names import printable, shorten

LARGEST_FILE = 1 << 30
"""bytes; nothing that is read here comes near it"""

Count = Annotated[int, 0]
Positive = Annotated[int, 1]
LARGEST = 1e100
Finite = Annotated[float, -LARGEST, LARGEST]
Share = Annotated[float, 0, 1]
Seconds = Annotated[float, 0, LARGEST]
"""kinds besides Python's own: numbers with the least, and the most, that they may be; sums and squares stay finite"""


class Unreadable(Exception):
    """A file is not what it should be; the message says in one line what was expected, and where in the file."""


class Absent(Unreadable):
    """There is no such file."""


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON or TOML is of an annotation's kind; whole numbers are numbers, too."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        base, least, *most = arguments
        return fits(value, base) and math.isfinite(value) and value >= least and all(value <= limit for limit in most)
    if origin is Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in arguments)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin in (tuple, list):
        if origin is tuple and arguments[-1] is not ...:
            return isinstance(value, list) and len(value) == len(arguments) and all(map(fits, value, arguments))
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if type(value) is int and kind in (int, float):
        return abs(value) < 1 << 63
    return type(value) is kind


def described(kind: Any) -> str:
    """A kind in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        base, least, *most = arguments
        if least == -LARGEST:
            return "a finite number"
        return described(base) + (f" from {least} to {most[0]}" if most else f" of at least {least}")
    if origin is Literal:
        return f"one of {', '.join(map(spelt, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(described(one) for one in arguments if one is not type(None))
    if origin is tuple and arguments[-1] is not ...:
        return f"a list of {' and '.join(map(described, arguments))}"
    if origin in (tuple, list):
        return f"a list, each {described(arguments[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text in quotes", dict: "a table"}
    return names.get(kind, str(kind))


def spelt(value: Any) -> str:
    """A value as JSON and TOML spell it, cut where it is long."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and abs(value) >= 1 << 63:  # Python refuses to write very long ones
        return "a number of more than 18 digits"
    return shorten(printable(f'"{value}"' if isinstance(value, str) else str(value)), 80)


def check_fields(table: Any, kinds: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """`table` with all of `kinds`, None for those that may be absent; other fields stay as they are.

    Raises:
        Unreadable: it is no table, or a field is missing or of another kind.
    """
    if not isinstance(table, dict):
        raise Unreadable(f"{where or 'the file'}: expected a table, got {spelt(table)}")
    place = f"{where}: " if where else ""
    for name, kind in kinds.items():
        value = table.get(name)
        if not fits(value, kind):
            got = "is missing; expected" if value is None else "must be"
            raise Unreadable(
                f"{place}{name} {got} {described(kind)}" + ("" if value is None else f", got {spelt(value)}")
            )
    return table | {name: table.get(name) for name in kinds}


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; raises `Unreadable`."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise Unreadable("it is no regular file")
        if status.st_size > LARGEST_FILE:
            raise Unreadable(f"it has {status.st_size:,} bytes, more than {LARGEST_FILE:,}")
        return path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise Absent("there is no such file") from None
    except OSError as error:
        raise Unreadable(f"it cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise Unreadable(f"it is no UTF-8 text (byte {error.start})") from None
    except ValueError as error:  # NUL in the path
        raise Unreadable(f"it cannot be read: {error}") from None


def read_json(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The object in a JSON file, see `check_fields`; raises `Unreadable`."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"it is no JSON ({error})") from None
    return check_fields(value, kinds)


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file; raises `Unreadable`."""
    try:
        return tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise Unreadable(f"it is not TOML: {printable(str(error))}") from None


def read_csv(path: Path, kinds: Mapping[str, Any], growing: bool = False) -> dict[str, list[Any]]:
    """Columns of a CSV file as lists of typed values, and `line`, the number of each row's line in the file.

    Args:
        kinds: the columns that are wanted, with what each cell must be: a text, or a number of some kind. Those that
            may also be None are None where a cell is empty, or the column is not there.
        growing: the file is being written: a last line without an end is left out, and there may be no line yet.

    Raises:
        Unreadable: a column is missing, a row is longer or shorter than the header, or a cell is of another kind.
    """
    text = read_text(path)
    if growing:
        text = text[: text.rfind("\n") + 1]
        if not text.strip():
            return {name: [] for name in (*kinds, "line")}
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: dict[str, list[Any]] = {name: [] for name in (*kinds, "line")}
    parsers = {name: _cell_parser(kind) for name, kind in kinds.items()}
    try:
        header = next((row for row in reader if row), [])
        places = _places(header, kinds)
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise Unreadable(f"line {reader.line_num}: {len(row)} fields, but the header has {len(header)}")
            columns["line"].append(reader.line_num)
            for name, parse in parsers.items():
                cell = row[places[name]] if name in places else ""
                try:
                    columns[name].append(parse(cell.strip()))
                except ValueError as error:
                    raise Unreadable(f"line {reader.line_num}, column {name}: {error}, got {spelt(cell)}") from None
    except csv.Error as error:
        raise Unreadable(f"line {reader.line_num}: {error}") from None
    return columns


def _places(header: list[str], kinds: Mapping[str, Any]) -> dict[str, int]:
    """Where the columns are that the header has."""
    names = [name.strip() for name in header]
    if missing := [name for name, kind in kinds.items() if name not in names and not fits(None, kind)]:
        raise Unreadable(f"it has no column {', '.join(missing)}; expected {', '.join(kinds)}")
    if twice := [name for name in kinds if names.count(name) > 1]:
        raise Unreadable(f"it has the column {twice[0]} more than once")
    return {name: names.index(name) for name in kinds if name in names}


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def _cell_parser(kind: Any) -> Callable[[str], Any]:
    """A function of a cell's text that returns its value, or raises `ValueError` with what was expected."""
    if get_origin(kind) in (Union, types.UnionType):  # of a kind and None
        parse = _cell_parser(get_args(kind)[0])
        return lambda text: parse(text) if text else None
    if kind is str:
        return _text_cell
    base, least, *most = get_args(kind)
    return functools.partial(_number_cell, whole=base is int, least=least, most=most[0] if most else 1 << 53, kind=kind)


def _text_cell(text: str) -> str:
    if not text or not text.isprintable() or len(text) > 200:
        raise ValueError("expected a text of 1 to 200 characters that can be printed")
    return text


def _number_cell(text: str, whole: bool, least: float, most: float, kind: Any) -> float:
    value = float(text) if _NUMBER.fullmatch(text) else math.nan  # float() itself takes nan, 1_000 and other digits
    if not least <= value <= most or (whole and value != int(value)):
        raise ValueError(f"expected {described(kind)}")
    return int(value) if whole else value
