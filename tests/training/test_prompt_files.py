"""Prompt files as people have them: other encodings, other systems' line ends, data sets, other scripts; and broken
ones.
"""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image

from saferope_benchmark.prompt_sets import i2p_set
from saferope_training.prompts import BENIGN, UNSAFE, PromptRecord, read_prompts, write_prompts
from saferope_training.prompts.formats import csv_rows
from saferope_training.prompts.lines import json_line
from saferope_training.prompts.readers import read_file, read_texts
from saferope_training.prompts.sources import prompts_for
from saferope_training.prompts.subjects import find_subject
from saferope_training.settings import Settings

OURS = '{"side": "unsafe", "text": "a red star", "subject": [6, 10]}'
STARS = "\u661f\u661f"  # "star" in Chinese
BOM = "\ufeff"
# What str.splitlines takes for a line's end, and JSON, CSV and people do not
SEPARATORS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def told(path, data: str | bytes, *subjects: str) -> str:
    """What reading a file of these contents is refused with."""
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ValueError) as caught:
        read_file(path, UNSAFE, subjects or ["star"])
    assert str(path) in str(caught.value) and "expected" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("before, after", [("", "\n"), (BOM, "\n"), ("", "\n\n  \n"), ("\n", "\r\n\r\n"), ("", "")])
def test_json_lines_may_have_marks_and_blank_lines(tmp_path, before, after):
    path = tmp_path / "p.jsonl"
    path.write_bytes((before + OURS + after + OURS + "\n" if after else before + OURS).encode())
    expected = [PromptRecord(UNSAFE, "a red star", (6, 10))] * (2 if after else 1)
    assert read_prompts(path) == read_file(path, UNSAFE) == expected


@pytest.mark.parametrize("name", ["P.TXT", "P.Csv", "P.JSONL", "P.JSON"])
def test_suffixes_are_taken_in_any_case(tmp_path, name):
    coco = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "a red star"}]}
    contents = {".txt": "a red star", ".csv": "prompt,sd_seed\na red star,7", ".jsonl": OURS, ".json": json.dumps(coco)}
    path = tmp_path / name
    path.write_text(contents[path.suffix.lower()])
    assert read_texts(path) == ["a red star"] and read_file(path, UNSAFE, ["star"])[0].subject == (6, 10)
    asks = i2p_set(path, "star", "star", seed=3).asks
    assert [(ask.text, ask.seed) for ask in asks] == [("a red star", 7 if "sv" in name else 3)]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_of_pairs_the_unsafe_prompts_alone_are_asked(tmp_path, ending):
    """In every format, and in the same order."""
    import pyarrow
    from pyarrow import parquet

    path, rows = tmp_path / f"p.{ending}", [{"unsafe_prompt": "a nude", "safe_prompt": "a robe"}]
    rows.append({"unsafe_prompt": "a star", "safe_prompt": "a moon"})
    if ending == "csv":
        path.write_text("\n".join(",".join(row) for row in ([*rows[0]], *(row.values() for row in rows))) + "\n")
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [ask.text for ask in i2p_set(path, "c", "c").asks] == ["a nude", "a star"]
    assert "a robe" in read_texts(path), "negative control: the file has more"


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.json", "p.jsonl"])
def test_other_encodings_are_told_with_file_and_line(tmp_path, name):
    text = "a star\n" + OURS
    assert "line 1: got bytes that are not UTF-8" in told(tmp_path / name, text.encode("utf-16"))
    assert "line 1: got a NUL character" in told(tmp_path / name, text.encode("utf-16-le"))
    assert "line 3: got bytes that are not UTF-8" in told(tmp_path / name, b"a\nb\ncaf\xe9\n")


def test_data_sets_lines_are_read(tmp_path):
    """Captioned pictures as folders of the Hugging Face hub have them: metadata.jsonl, metadata.csv."""
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a red star"}\n')
    (tmp_path / "metadata.csv").write_text("file_name,caption\n1.png,a red star\n")
    for name in ("metadata.jsonl", "metadata.csv"):
        assert read_file(tmp_path / name, UNSAFE, ["star"]) == [PromptRecord(UNSAFE, "a red star", (6, 10))]
        (record,) = read_file(tmp_path / name, BENIGN, images=tmp_path)
        assert record == PromptRecord(BENIGN, "a red star", image=str((tmp_path / "1.png").resolve()))
    (tmp_path / "metadata.csv").write_text("file_name,caption\n2.png,x\n3.png,y\n1.png,z\n")
    with pytest.raises(ValueError, match=r"metadata.csv, line 2: got no picture '2.png' in .*expected it there"):
        read_file(tmp_path / "metadata.csv", BENIGN, images=tmp_path)


@pytest.mark.parametrize(
    "line, why",
    [
        ('{"file_name": "1.png", "words": "a"}', "got 'file_name', 'words', expected one named 'prompt', 'text'"),
        ('{"text": 7}', "text is 7, expected a string"),
        ('{"side": "unsafe", "text": 7}', "text is 7, expected a string"),
        ('{"side": "unsafe", "text": "a star", "subject": 2}', "subject is 2, expected the"),
        ('{"side": "unsafe", "text": "a star", "subject": [2, 6.0]}', "subject is "),
        ('{"side": "unsafe", "text": "a star", "subject": [2, 6], "seed": 1}', "'seed', expected side and text"),
        ('{"side": "benign", "text": "a", "scene": 1}', "scene is 1, expected an object"),
        ('{"side": "unsafe", "text": "\\ud83d star", "subject": [2, 6]}', "half of a character"),
        ('{"text": "\\ud83d star"}', "half of a character"),
        ("[" * 100_000, "got no JSON: "),
        ("7", "got '7', expected {"),
    ],
)
def test_lines_that_are_no_prompts_are_told(tmp_path, line, why):
    found = told(tmp_path / "p.jsonl", f"{OURS}\n\n{line}\n")
    assert "line 3: " in found and why in found and "__init__" not in found


def csv_of(*lines: str) -> str:
    return "\n".join(["prompt,sd_seed", *lines, *(f"a blue star number {n},{n}" for n in range(3)), ""])


@pytest.mark.parametrize(
    "lines, why",
    [
        (['"a red star on the beach,1'], "line 2: got unexpected end of data, expected quotes in pairs"),
        (["a star,0", '"a red star,1', '"a star, left",2'], "line 3: got ',' expected after '\"', expected quotes"),
        (['"a red "big" star",1'], "line 2: got ',' expected"),
        (["a star,0", "a red star, on the beach,1"], "line 3: got 3 fields, expected 2"),
        (['"a red star,1', "a star,2", 'a big star",3'], "line 2: got a text that goes on to line 4 and holds whole"),
    ],
)
def test_broken_csv_is_told(tmp_path, lines, why):
    assert why in told(tmp_path / "p.csv", csv_of(*lines))


def test_a_quote_that_swallows_a_long_file_is_told(tmp_path):
    """More than the csv module's limit for a field."""
    rows = [f"a blue star number {n} on a table,{n}" for n in range(5000)]
    found = told(tmp_path / "p.csv", csv_of("a star,0", '"a red star,1', *rows))
    assert "line 3: got field larger than field limit" in found and "close the quote" in found


def test_good_csv_is_read(tmp_path):
    """The control: quotes in quotes, commas and lines in quotes, quotes within a word, rows that end early,
    blank ones."""
    lines = ['"a ""big"" star,\nleft",1', 'a 5" star,2', "a star", "", '"x, star\n\n y",3']
    path = tmp_path / "p.csv"
    path.write_text(csv_of(*lines))
    texts = [record.text for record in read_file(path, UNSAFE, ["star"])]
    assert texts[:4] == ['a "big" star,\nleft', 'a 5" star', "a star", "x, star\n\n y"] and len(texts) == 7
    assert [number for number, _ in csv_rows(path, csv_of(*lines))] == [2, 4, 5, 7, 10, 11, 12]
    path.write_text("prompt\n" + "\n".join(f"star {n}" for n in range(5)))
    assert len(read_texts(path)) == 5


@pytest.mark.parametrize("seed, found", [("7", 7), (" 7.0", 7), ("", 12)])
def test_seeds_of_tables_are_read(tmp_path, seed, found):
    (tmp_path / "p.csv").write_text(f"prompt,sd_seed\na,1\n\nb,2\nc,{seed}\n")
    assert [ask.seed for ask in i2p_set(tmp_path / "p.csv", "c", "c", seed=10).asks] == [1, 2, found]


@pytest.mark.parametrize("seed", ["7.5", "\u00b2", "none", "-1"])
def test_seeds_that_are_none_are_told(tmp_path, seed):
    (tmp_path / "p.csv").write_text(f"prompt,sd_seed\na,1\n\nc,{seed}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"p\.csv, line 4: got sd_seed .* expected a whole number"):
        i2p_set(tmp_path / "p.csv", "c", "c")


@pytest.mark.parametrize("mark", SEPARATORS)
def test_only_a_newline_ends_a_line(tmp_path, mark):
    text = f"a red{mark}big star"
    assert len(text.splitlines()) == 2, "the trap is one"
    record = PromptRecord(UNSAFE, text, (10, 14))
    write_prompts(tmp_path / "p.jsonl", [record, record])
    assert read_prompts(tmp_path / "p.jsonl") == [record] * 2
    assert len((tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()) == 2, "whoever reads it"
    (tmp_path / "raw.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "p.txt").write_text(text + "\n", encoding="utf-8")
    (tmp_path / "p.csv").write_text(csv_of(f"{text},1"), encoding="utf-8")
    for name in ("raw.jsonl", "p.txt", "p.csv"):
        assert read_texts(tmp_path / name)[0] == text
    assert i2p_set(tmp_path / "p.csv", "star", "star").asks[0].text == text


def test_a_json_line_is_one_line_that_says_the_same():
    text = f"na\u00efve {STARS} \U0001f600 {SEPARATORS}\n"
    line = json_line({"text": text})
    assert line.splitlines(keepends=True) == [line] and line.endswith("}\n")
    assert json.loads(line) == {"text": text} and STARS in line, "readable"


@pytest.mark.parametrize(
    "text, subject, found",
    [
        (f"\u684c\u5b50\u4e0a\u6709\u7ea2\u8272\u7684{STARS}", STARS, STARS),
        (f"{STARS}\uff0c\u5de6\u8fb9", STARS, STARS),
        ("\u4e00\u9897star\u5728", "star", "star"),
        ("\u5927\u304d\u306a\u30b9\u30bf\u30fc\u304c", "\u30b9\u30bf\u30fc", "\u30b9\u30bf\u30fc"),
        ("\ube68\uac04 \ubcc4\uc774", "\ubcc4", "\ubcc4"),
        ("\u0e14\u0e32\u0e27\u0e41\u0e14\u0e07", "\u0e41\u0e14\u0e07", "\u0e41\u0e14\u0e07"),
        ("a Star, left", "star", "Star"),
        ("a_star and stars but 'star'", "star", "star"),
        ("xa b a b a", "a b a", "a b a"),
        ("cafe\u0301 noir", "caf\u00e9", "cafe\u0301"),
        ("caf\u00e9 noir", "cafe\u0301", "caf\u00e9"),
        ("superstar", "star", None),
        ("stars", "star", None),
        ("star7", "star", None),
        ("cafe\u0301s", "caf\u00e9", None),
        ("\u0924\u093e\u0930\u093e", "\u0924\u093e\u0930", None),
        ("\u0437\u0432\u0435\u0437\u0434\u0430", "\u0437\u0432\u0435\u0437\u0434", None),
    ],
)
def test_subjects_are_found_in_any_script(text, subject, found):
    """Chinese, Japanese, Korean and Thai put no space around a word; Latin, Cyrillic and Devanagari do."""
    span = find_subject(text, ["nothing", subject])
    assert (span and text[slice(*span)]) == found


def test_a_subject_that_is_nowhere_is_told_with_its_line(tmp_path):
    found = told(tmp_path / "p.txt", f"{STARS}\n\na moon\n", STARS)
    assert f"line 3: none of {STARS} stands in the prompt 'a moon', expected one; add its word to --subjects" in found
    (tmp_path / "p.txt").write_text(f"{STARS}\na moon\n", encoding="utf-8")
    assert len(read_file(tmp_path / "p.txt", UNSAFE, [STARS], count=1)) == 1, "what is not asked for is not looked at"


@pytest.mark.parametrize(
    "images, why",
    [([{"id": 1, "file_name": 5}], "a file_name is no string"), ([], "KeyError"), (None, "TypeError")],
)
def test_captions_without_pictures_names_are_told(tmp_path, images, why):
    captions = {"images": images, "annotations": [{"image_id": 1, "caption": "a star"}]}
    assert why in told(tmp_path / "p.json", json.dumps(captions))


SITUATIONS = [
    ("a naked man on a wide beach", "a clothed man on a wide beach"),
    ("blood on the snow", "leaves on the snow"),
]


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl"])
def test_pairs_are_read_as_pairs(tmp_path, name):
    path = tmp_path / name
    fields = [dict(zip(("unsafe_prompt", "safe_prompt"), pair, strict=True), category="Nudity") for pair in SITUATIONS]
    lines = [",".join(fields[0]), *(",".join(each.values()) for each in fields)]
    json_lines = "".join(json.dumps(each) + "\n" for each in fields)
    path.write_text(json_lines if name.endswith("jsonl") else "\n".join(lines) + "\n")
    unsafe, benign = read_file(path, UNSAFE), read_file(path, BENIGN)
    assert [record.text[slice(*record.subject)] for record in unsafe] == ["naked", "blood"]
    assert [(record.text, record.instead) for record in unsafe] == SITUATIONS
    assert [record.text for record in benign] == [pair[1] for pair in SITUATIONS]


def test_pairs_that_do_not_differ_are_told(tmp_path):
    line = json.dumps({"unsafe_prompt": "a man", "safe_prompt": "a man"})
    assert "expected words that the safe prompt has not" in told(tmp_path / "p.jsonl", line)
    assert "no string" in told(tmp_path / "p.jsonl", json.dumps({"unsafe_prompt": "a man", "safe_prompt": 1}))


@pytest.mark.parametrize("column", ["prompt", "adv_prompt", "sensitive prompt"])
def test_columns_of_attacks_are_read(tmp_path, column):
    (tmp_path / "p.csv").write_text(f"{column},evaluation_seed\na red star,7\n")
    assert read_file(tmp_path / "p.csv", UNSAFE, ["star"]) == [PromptRecord(UNSAFE, "a red star", (6, 10))]
    (ask,) = i2p_set(tmp_path / "p.csv", "star", "star").asks
    assert (ask.text, ask.seed) == ("a red star", 7)
    assert "expected one named" in told(tmp_path / "q.csv", "target\na red star\n"), "negative control"


def safesteer(path, rows=()):
    """A file in SafeSteer's layout: pairs of one situation in categories, beside columns that nobody asks for."""
    import pyarrow
    from pyarrow import parquet

    pairs = [
        ("Sexual", "Nudity", "a naked man reads", "a clothed man reads"),
        ("Violence", "Bloody content", "a bloody knife", "a clean knife"),
        ("Sexual", "Nudity", "a nude statue stands", "a plain statue stands"),
    ]
    names = ("category", "subcategory", "unsafe_prompt", "safe_prompt")
    made = [dict(zip(names, row, strict=True)) | {"similarity": 0.9, "of": {"deep": [1]}} for row in (*pairs, *rows)]
    parquet.write_table(pyarrow.Table.from_pylist(made), path)
    return path


def test_pairs_of_parquet_are_read_by_category(tmp_path):
    path = safesteer(tmp_path / "SafeSteer_train.parquet")
    assert len(read_file(path, UNSAFE)) == len(read_file(path, BENIGN)) == 3
    found = read_file(path, UNSAFE, category="nudity")
    assert found == [
        PromptRecord(UNSAFE, "a naked man reads", (2, 7), instead="a clothed man reads"),
        PromptRecord(UNSAFE, "a nude statue stands", (2, 6), instead="a plain statue stands"),
    ]
    assert [record.text for record in read_file(path, BENIGN, category="Violence")] == ["a clean knife"]
    with pytest.raises(ValueError, match=r"category 'Gore', expected one of 'Bloody content', 'Nudity', 'Sexual'"):
        read_file(path, UNSAFE, category="Gore")
    safesteer(path, [("Sexual", "Nudity", None, "a wall")])
    with pytest.raises(ValueError, match=r"\.parquet, row 4: a prompt of the pair is no string"):
        read_file(path, UNSAFE)


def test_a_category_chooses_on_both_sides_of_pairs_and_only_there(tmp_path):
    """The same rows of other tables; benign prompts of another file are no rows of that category."""
    path, other = str(safesteer(tmp_path / "p.parquet")), tmp_path / "b.txt"
    other.write_text("a wall\na door\n")
    texts = lambda **given: [r.text for r in prompts_for(Settings("mine", "x", unsafe=path, **given))]  # noqa: E731
    assert texts(benign=path, category="Bloody content") == ["a bloody knife", "a clean knife"]
    assert texts(benign=str(other), category="Bloody content") == ["a bloody knife", "a wall", "a door"]
    assert len(texts(benign=path)) == 6
    i2p = tmp_path / "i2p.csv"
    i2p.write_text('prompt,categories\na star,"hate, sexual"\na star left,shocking\n')
    assert [r.text for r in read_file(i2p, UNSAFE, ["star"], category="sexual")] == ["a star"]
    with pytest.raises(ValueError, match=r"category 'sexual' of a \.txt file, expected a table with a column"):
        read_file(other, UNSAFE, ["a"], category="sexual")
    with pytest.raises(ValueError, match="'category': got 'x', expected none without --unsafe"):
        Settings(category="x")


def test_parquet_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    found = told(tmp_path / "p.parquet", "prompt\na star\n")
    assert "not a parquet file" in found
    parquet.write_table(pyarrow.Table.from_pylist([{"words": "a star"}]), tmp_path / "q.parquet")
    with pytest.raises(ValueError, match=r"q\.parquet, the names of the columns: got 'words', expected one named"):
        read_file(tmp_path / "q.parquet", UNSAFE, ["star"])
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none.parquet", UNSAFE, ["star"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"expected pyarrow to read it; pip install 'saferope\[parquet\]'"):
        read_file(tmp_path / "q.parquet", UNSAFE, ["star"])


def test_p4d_prompts_are_read_as_they_are_kept(tmp_path):
    (tmp_path / "p4d.csv").write_text("target_prompt,adversarial_prompt,best_similarity\nplain,a star zx,0.9\n")
    assert read_texts(tmp_path / "p4d.csv") == ["a star zx"]
