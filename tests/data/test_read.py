"""Files of every format, valid and broken: unread rows are rejected with line and reason."""

import gzip
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from backfire.errors import UserError
from tests.helpers.formats import CSV, FORMATS, ROWS, read


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_every_format_gives_the_same_records(tmp_path, name, packed, bom):
    content, lines = FORMATS[name]
    data = bom + content.encode()
    name, data = (name + ".gz", gzip.compress(data)) if packed else (name, data)
    assert read(tmp_path / name, data, "fail") == (ROWS, lines, {})


def test_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", None, "fail") == (ROWS, [1, 2, 3], {})


def test_bars_and_decimals_with_commas(tmp_path):
    for text in ("a|b\n1,5|x\n", "a;b\r\n1,5;x\r\n"):
        assert read(tmp_path / "a.csv", text, "fail")[0] == [{"a": "1,5", "b": "x"}]
    # A text may hold any sign; only a table that is cut alike everywhere is cut by it.
    rows, _, _ = read(tmp_path / "a.csv", "so; so\nno\n", "fail", header=False)
    assert rows == [{"0": "so; so"}, {"0": "no"}]


def test_gzip_is_recognized_by_its_bytes(tmp_path):
    assert read(tmp_path / "a.csv", gzip.compress(CSV.encode()))[0] == ROWS


def test_table_without_header(tmp_path):
    rows, lines, _ = read(tmp_path / "a.csv", '0,"one\ntwo"\n1,three\n', header=False)
    assert rows == [{"0": "0", "1": "one\ntwo"}, {"0": "1", "1": "three"}]
    assert lines == [1, 3]


def test_sentiment140_has_no_header_and_is_latin_1(tmp_path):
    line = (
        '"4","1467822272","Mon Apr 06 22:22:45 PDT 2009","NO_QUERY","ersle","caf\xe9 "ok", yes"\n'
    )
    rows, _, bad = read(tmp_path / "training.csv", (line * 2).encode("latin-1"), "skip")
    assert not rows and bad[1].startswith("7 cells")  # the unescaped quotes and comma
    rows, lines, bad = read(tmp_path / "t.csv", line.replace('"ok", ', "").encode("latin-1"))
    assert (rows[0]["target"], rows[0]["text"], lines, bad) == ("4", "café yes", [1], {})


def test_tsv_takes_quotes_as_they_are_unless_doubled(tmp_path):
    text = 'sentence\tlabel\n"open quote\t0\n"whole"\t1\n"he said ""no"""\t1\n'
    rows, _, bad = read(tmp_path / "dev.tsv", text)
    assert [row["sentence"] for row in rows] == ['"open quote', '"whole"', 'he said "no"']
    assert not bad


BROKEN = {
    "unequal.csv": ("a,b\n1,2\n1\n1,2,3\n3,4\n", 2, {3: "1 cells", 4: "3 cells"}),
    "after.csv": ('a,b\n"x"y,1\n2,3\n', 1, {2: "not a valid table row"}),
    "over.csv": ('a,b\n"x,1\n2,3\n"y",4\n5,6\n', 1, {2: "lines 2 to 4"}),
    "endless.csv": (f"a,b\n{'x' * (2**24 + 1)},1\n2,3\n", 1, {2: "limit"}),
    "nul.csv": ("a,b\nx\0,1\n2,3\n", 1, {2: "NUL"}),
    "latin.csv": (b"a,b\ncaf\xe9,1\n2,3\n", 1, {2: "UTF-8"}),
    "latin.tsv": (b"a\tb\ncaf\xe9\t1\n2\t3\n", 1, {2: "UTF-8"}),
    "mac.csv": ("a,b\r1,2\r", 0, {1: "not a valid table row"}),
    "latin.jsonl": (b'{"a": "caf\xe9"}\n{"a": "b"}\n', 1, {1: "byte 0xe9"}),
    "text.jsonl": ('hello\n{"a": 1}\n', 1, {1: "not valid JSON"}),
    "list.jsonl": ('[1]\n7\nnull\n"x"\n{"a": 1}\n', 1, dict.fromkeys((1, 2, 3, 4), "record")),
    "cut.jsonl": ('{"a": 1}\n{"a": ', 1, {2: "not valid JSON"}),
    "nul.jsonl": ('{"a": "x\0"}\n{"a": 1}\n', 1, {1: "not valid JSON"}),
    "escaped.jsonl": ('{"a": "\\u0000"}\n{"a": ["\\ud800"]}\n', 0, {1: "NUL", 2: "not UTF-8"}),
    "twice.jsonl": ('{"a": 1, "a": 2}\n{"b": {"c": 1, "c": 2}}\n', 0, {1: "key 'a'", 2: "key 'c'"}),
    "deep.jsonl": ("[" * 100_000 + '\n{"a": 1}\n', 1, {1: "nested"}),
    "digits.jsonl": (f'{{"a": {"9" * 5000}}}\n{{"a": 1}}\n', 1, {1: "4300"}),
    "mixed.json": ('[{"a": 1},\n 3,\n{"a": 1, "a": 2}]', 1, {2: "a number", 3: "key 'a'"}),
    "number.json": ("7", 0, {1: "a number"}),
    "wrapped.json": ('{"data": [{"a": 1},\n{"a": 1, "a": 2}]}', 1, {2: "key 'a'"}),
    "pretty.jsonl": ('{"a": 1}\n{\n', 1, {2: "one record a line; over several, name it .json"}),
}


UNREADABLE = {
    "quote.csv": ('a,b\n1,"x\n2,y\n', 2, "quote left open"),
    "twice.csv": ("a,a\n1,2\n", 1, "duplicate column 'a'"),
    "header.csv": (b"a,\xff\n1,2\n", 1, "UTF-8"),
    "cut.json": ('[{"a": 1},\n{"a": 2},\n{"a"', 3, "not valid JSON"),
    "extra.json": ('[{"a": 1}] []', 1, "Extra data"),
    "comma.json": ('[{"a": 1},\n]', 2, "not valid JSON"),
    "deep.json": ("[" * 100_000, 1, "nested"),
    "latin.json": (b'[{"a": 1},\n{"a": "\xe9"}]', 2, "UTF-8"),
    "lists.json": (
        '{"train": [{"a": 1}], "test": [{"a": 1}]}',
        1,
        "several lists of rows (train, test)",
    ),
    "comment.json": ('// mine\n[{"a": 1}]', 1, "JSON has no comments"),
    "remark.json": ('[{"a": 1}, # mine\n{"a": 2}]', 1, "JSON has no comments"),
    "end.json": ('[{"a": 1},]', 1, "is there an extra comma"),
    "numbers.json": ('{"0": {"0": "x"}, "1": {"0": 1}}', 1, "rows and columns look alike"),
    "ragged.json": ('{"columns": ["a", "b"], "data": [[1, 2], [3]]}', 1, "as many cells"),
    "wide.csv": (",".join(["a" * 99] * 2) + "\n", 1, f"duplicate column '{'a' * 39}…'"),
    "open.csv": ('a,b\n1,x\n2,"y\n3,z\n4,z\n', 3, "quote left open"),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("on_bad_row", ["skip", "fail"])
def test_a_file_that_cannot_be_read_to_its_end_is_no_short_file(tmp_path, name, on_bad_row):
    content, line, part = UNREADABLE[name]
    with pytest.raises(UserError, match=rf"{name}, line {line}: .*[^.]\.$") as caught:
        read(tmp_path / name, content, on_bad_row)
    assert part in str(caught.value)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_rejected_with_line_and_reason(tmp_path, name):
    content, accepted, reasons = BROKEN[name]
    rows, _, bad = read(tmp_path / name, content)
    assert len(rows) == accepted
    assert list(bad) == list(reasons)
    assert all(part in bad[line] for line, part in reasons.items())
    line = min(bad)
    with pytest.raises(UserError, match=f"{name}, line {line}: .*[^.]\\.$"):
        read(tmp_path / name, content, "fail")


REFUSED = {
    "empty.csv": (b"", "has no rows"),
    "empty.jsonl": (b"\n \n", "has no rows"),
    "empty.json": (b"[]", "has no rows"),
    "empty.csv.gz": (b"", "has no rows"),
    "only_header.csv": (b"text,label\n", "has no rows"),
    "wrapped.json": (b'{"data": []}', "has no rows"),
    "notes.txt": (b"hello", "unknown data format"),
    "no_suffix": (b"hello", "unknown data format"),
    "table.csv": (b"PK\x03\x04...", "zip archive"),
    "parquet.jsonl": (b"PAR1....", "a Parquet file"),
    "text.parquet": (b"text,label", "not a Parquet file"),
    "plain.csv.gz": (b"text,label\na,b\n", "not a gzip file"),
    "wide.csv": ("text,label\na,b\n".encode("utf-16"), "UTF-16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_no_data(tmp_path, name):
    content, sentence = REFUSED[name]
    with pytest.raises(UserError, match=sentence):
        read(tmp_path / name, content)


def test_no_file_a_folder_and_one_we_may_not_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "none.csv", None)
    with pytest.raises(UserError, match="is a folder"):
        read(tmp_path, None)
    (tmp_path / "a.csv").write_text("a\n1\n")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(UserError, match=r"a\.csv cannot be read: Permission denied"):
        read(tmp_path / "a.csv", None)


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz", "list.json.gz"])
def test_cut_off_archive_is_no_short_file(tmp_path, name):
    content = FORMATS[name.removesuffix(".gz")][0].encode() * 200
    whole = gzip.compress(content, compresslevel=1)
    flipped = bytearray(whole)
    flipped[-6] ^= 0xFF  # the checksum
    for damaged in (whole[: len(whole) // 2], whole[:-4], bytes(flipped)):
        with pytest.raises(UserError, match=r"line \d+: the compressed file is damaged or trunc"):
            read(tmp_path / name, damaged)


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS * 1000), path)
    whole = path.read_bytes()
    for end in (8, len(whole) // 2, len(whole) - 4):
        with pytest.raises(UserError, match="line 1: the Parquet file is damaged from here on"):
            read(path, whole[:end])
    pq.write_table(pa.table([["x"], ["y"]], names=["a", "a"]), path)
    with pytest.raises(UserError, match="line 1: duplicate column"):
        read(path, None)


@pytest.mark.slow
def test_importing_the_readers_is_light():
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'pandas', 'numpy'}"
    code = f"import sys, backfire.datasets.files; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
