"""Readers of prompt files: plain text, COCO captions, and tables (JSON lines, CSV as I2P's, parquet).

Every reader gives entries in the file's order, each with its place. A ValueError names the file, the line, the value
got, the value expected and the remedy.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import BENIGN, UNSAFE, PromptRecord, object_of, record_of
from .instead import changed_span
from .lines import numbered, read_text

# Columns, or fields of JSON lines, that hold a prompt. Sources: I2P, P4D and Ring-A-Bell, captioned pictures on the
# Hugging Face hub, MMA-Diffusion, P4D as eval-unlearn keeps it, and Ring-A-Bell as suites of erasing methods have it
TEXT_NAMES = ("prompt", "text", "caption", "adv_prompt", "adversarial_prompt", "sensitive prompt")
PAIR = ("unsafe_prompt", "safe_prompt")  # of one situation, as SafeSteer has them
CATEGORY_NAMES = ("category", "subcategory", "categories")  # SafeSteer's two, and I2P's, with commas between several
IMAGE_NAME = "file_name"  # of a caption's picture, in such data sets and in COCO's files
FORMATS = (
    ".txt (a prompt a line), .jsonl (ours, or with a prompt, text or caption), .csv (with such a column, "
    "as I2P has), .parquet (the same, or SafeSteer's pairs), .json (COCO captions)"
)
_PARQUET_ERRORS = (OSError, KeyError, ValueError, NotImplementedError)  # pyarrow's own errors are kinds of these

Rows = Iterator[tuple[int, dict]]


@dataclass(frozen=True)
class Entry:
    """A prompt of a file: its place, its picture's file name, and its `record` where the line is one of ours."""

    where: str
    text: str
    image: str | None = None
    record: PromptRecord | None = None


def entries(path: Path, category: str | None = None) -> list[Entry]:
    """The prompts of a file; empty ones are left out. The suffix, in lower or upper case, says the format.

    `category`: only the rows of a table that have it in one of CATEGORY_NAMES, in lower or upper case.
    """
    readers: dict[str, Callable[[Path], Iterable[Entry]]] = {".txt": _plain, ".json": _coco}
    tables: dict[str, Callable[[Path], Rows]] = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
    suffix = path.suffix.lower()
    if suffix in tables:
        rows = tables[suffix](path)
        chosen = rows if category is None else _of_category(path, rows, category)
        found = [entry for number, fields in chosen for entry in _entries_of(path, number, fields)]
    elif suffix not in readers:
        raise ValueError(f"{path}: got a {path.suffix or 'nameless'} file, expected {FORMATS}; rename or convert it")
    elif category is not None:
        raise ValueError(
            f"{path}: got category {category!r} of a {suffix} file, expected a table with a column "
            f"{_either(CATEGORY_NAMES)}; leave --category out"
        )
    else:
        found = list(readers[suffix](path))
    return [entry for entry in found if entry.record or entry.text]


def _of_category(path: Path, rows: Rows, category: str) -> list[tuple[int, dict]]:
    """The rows of a category. Where it has none, ValueError names the file's categories."""
    known: dict[str, str] = {}
    chosen = []
    for number, fields in rows:
        values = [fields[name] for name in CATEGORY_NAMES if isinstance(fields.get(name), str)]
        names = {part.strip() for value in values for part in value.split(",") if part.strip()}
        names.update(value.strip() for value in values)  # a name may hold a comma itself
        known.update({name.casefold(): name for name in names})
        if category.casefold() in {name.casefold() for name in names}:
            chosen.append((number, fields))
    if not chosen:
        there = _either(sorted(known.values())) or f"a column {_either(CATEGORY_NAMES)}"
        raise ValueError(f"{path}: got no prompt of category {category!r}, expected one of {there:.1000}; correct it")
    return chosen


def _either(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _plain(path: Path) -> Iterator[Entry]:
    return (Entry(_place(path, number), line.strip()) for number, line in numbered(read_text(path)))


def _json_lines(path: Path) -> Rows:
    return ((number, object_of(path, number, line)) for number, line in numbered(read_text(path)))


def _csv(path: Path) -> Rows:
    return iter(csv_rows(path, read_text(path)))


def _parquet(path: Path) -> Rows:
    """A parquet file's rows, from 1. Of nested columns nothing is read, so that a file's types stay plain."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{path}: got a parquet file, expected pyarrow to read it; pip install 'saferope[parquet]', or save it as "
            ".csv or .jsonl"
        ) from None
    known = {*TEXT_NAMES, *PAIR, *CATEGORY_NAMES, IMAGE_NAME}
    try:
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            read = [name for name in dict.fromkeys(names) if name in known]
            if not set(PAIR) <= set(names):
                _text_name(f"{path}, the names of the columns", names)
            rows = file.read(columns=read).to_pylist()
    except FileNotFoundError:
        raise
    except _PARQUET_ERRORS as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: not a parquet file ({error!s:.200}); expected one; fetch it again") from None
    return iter(list(enumerate(rows, start=1)))


def _entries_of(path: Path, number: int, fields: dict) -> Iterator[Entry]:
    """The entries of a table's row: a record of ours, a prompt, or a pair's two, which differ in the concept."""
    where = _place(path, number)
    if path.suffix.lower() == ".jsonl" and "side" in fields:
        record = record_of(path, number, fields)
        yield Entry(where, record.text, record.image, record)
        return
    if not set(PAIR) <= set(fields):
        yield _caption(where, fields)
        return
    unsafe, safe = (fields[name] for name in PAIR)
    if not (isinstance(unsafe, str) and isinstance(safe, str)):
        raise ValueError(f"{where}: a prompt of the pair is no string, expected two; correct the line")
    span = changed_span(unsafe, safe)
    if span[0] == span[1]:
        raise ValueError(
            f"{where}: got {unsafe!r:.80} as unsafe, expected words that the safe prompt has not; take the pair out"
        )
    yield Entry(where, unsafe, None, PromptRecord(UNSAFE, unsafe, span, instead=safe))
    yield Entry(where, safe, None, PromptRecord(BENIGN, safe))


def _caption(where: str, fields: dict) -> Entry:
    """The entry of a data set's line."""
    name = _text_name(where, list(fields))
    text, image = fields[name], fields.get(IMAGE_NAME)
    for key, value in ((name, text), (IMAGE_NAME, image)):
        if not isinstance(value, str | None):
            raise ValueError(f"{where}: {key} is {value!r:.80}, expected a string; correct the line")
    return Entry(where, (text or "").strip(), image)


def row_text(row: dict[str, str]) -> str:
    """The prompt of a row that `csv_rows` gave."""
    return next(row[name] for name in (*TEXT_NAMES, PAIR[0]) if name in row).strip()


def _text_name(where: str, names: Sequence[str]) -> str:
    """The first of TEXT_NAMES among the names of columns or fields."""
    found = [name for name in TEXT_NAMES if name in names]
    if not found:
        raise ValueError(
            f"{where}: got {', '.join(map(repr, names)) or 'nothing':.200}, expected one named "
            f"{', '.join(map(repr, TEXT_NAMES))}; rename the one that holds the prompts"
        )
    return found[0]


def csv_rows(path: Path, data: str) -> list[tuple[int, dict[str, str]]]:
    """Rows by the names in the first, each with the line it begins on; "" where a row ends early.

    ValueError where a row has too many fields, where quotes do not pair, and where a quoted text holds whole rows.
    """
    parsed = _records(path, data)
    number, names = next(parsed, (1, []))
    if not set(PAIR) <= set(names):
        _text_name(f"{_place(path, number)}, the names of the columns", names)
    rows = []
    for number, row in parsed:
        if len(row) > len(names):
            raise ValueError(
                f"{_place(path, number)}: got {len(row)} fields, expected {len(names)}, as in the first line; put a "
                "text with "
                'commas in quotes, "like, this"'
            )
        rows.append((number, dict.fromkeys(names, "") | dict(zip(names, row, strict=False))))
    return rows


def _records(path: Path, data: str) -> Iterator[tuple[int, list[str]]]:
    """Records of a CSV file that are not blank, each with the line it begins on."""
    lines, first = data.split("\n"), 1
    reader = csv.reader(io.StringIO(data, newline="\n"), strict=True)
    commas = None
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:  # of the quotes, or of a text without end, which is a quote's too
            raise _open_quote(path, first, str(error)) from None
        if fields is None:
            return
        if fields:
            commas = len(fields) - 1 if commas is None else commas
            held = lines[first - 1 : reader.line_num]
            if commas and len(held) > 2 and all(line.count(",") == commas for line in held):
                raise _open_quote(path, first, f"a text that goes on to line {reader.line_num} and holds whole rows")
            yield first, fields
        first = reader.line_num + 1


def _open_quote(path: Path, first: int, got: str) -> ValueError:
    return ValueError(
        f'{_place(path, first)}: got {got}, expected quotes in pairs; close the quote that opens there, and write "" '
        "for one "
        "inside of a text"
    )


def _coco(path: Path) -> list[Entry]:
    """One caption a picture, the first one listed, in the file's order."""
    try:
        content = json.loads(read_text(path))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        if not all(isinstance(name, str) for name in names.values()):
            raise TypeError("a file_name is no string")
        captions: dict = {}
        for entry in content["annotations"]:
            captions.setdefault(entry["image_id"], entry["caption"].strip())
        return [Entry(f"{path}, picture {key!r:.40}", text, names[key]) for key, text in captions.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not COCO captions ({error!r:.200}); expected `images` with id and file_name, `annotations` with "
            "image_id and caption; prompts one a line belong in a .jsonl file"
        ) from None


def _place(path: Path, number: int) -> str:
    return f"{path}, {'row' if path.suffix.lower() == '.parquet' else 'line'} {number}"
