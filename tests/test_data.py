import csv
import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bayeslora.data import Question, load_questions, parse_question, split_questions

GOOD = {"question": "2 + 2 =", "choices": ["3", "4", "five"], "answer": 1}


def write(path, *rows):
    path.write_text(
        "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8"
    )
    return str(path)


@pytest.mark.parametrize("answer", [1, 1.0, "1", "B", "b", " b", "4", " 4 "])
def test_an_answer_is_an_index_a_letter_or_the_text(answer):
    assert parse_question({**GOOD, "answer": answer}, "row 1") == Question("2 + 2 =", ("3", "4", "five"), 1)


def test_the_text_of_a_choice_wins_over_a_letter():
    row = {"question": "Which vitamin?", "choices": ["B", "A"], "answer": "A"}
    assert parse_question(row, "row 1").answer == 1


def test_a_text_is_taken_as_written_before_it_is_taken_in_any_case():
    row = {"question": "q", "choices": ["Us", "US", "them"]}
    assert parse_question({**row, "answer": "US"}, "row 1").answer == 1
    assert parse_question({**row, "answer": "THEM"}, "row 1").answer == 2
    with pytest.raises(ValueError, match="answer 'us' is the text of several choices; give its index"):
        parse_question({**row, "answer": "us"}, "row 1")


def test_digits_are_an_index_only_where_no_choice_is_called_so():
    assert parse_question({"question": "q", "choices": ["2", "1", "0"], "answer": "1"}, "row 1").answer == 1
    assert parse_question({"question": "q", "choices": ["2", "1", "0"], "answer": "2"}, "row 1").answer == 0
    choices = {"text": ["x", "y"], "label": ["A", "B"]}
    with pytest.raises(ValueError, match="got '1'"):
        parse_question({"question": "q", "choices": choices, "answerKey": "1"}, "row 1")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["x", "y", "z"], "choices have 2 texts and 3 labels"),
        (5, "choices' label must be a list of strings; got 5"),
        ("xy", "choices' label must be a list of strings; got 'xy'"),
        (["x", "x"], "choices' label must differ from each other"),
        (["x", 2], "every one of choices' label must be a non-empty string; got 2"),
    ],
)
def test_labels_that_are_not_one_a_choice_are_refused(labels, message):
    row = {"question": "q", "choices": {"text": ["a", "b"], "label": labels}, "answer": "z"}
    with pytest.raises(ValueError, match=f"row 1: {message}"):
        parse_question(row, "row 1")


def test_rows_without_choices_take_the_labels_of_all_rows(tmp_path):
    labels = ("bug", "praise")
    path = write(tmp_path / "rows.jsonl", {"text": "it crashes", "label": "BUG"}, {**GOOD, "answer": "five"})
    found = load_questions(path, labels=labels)
    assert found == [Question("it crashes", labels, 0), Question("2 + 2 =", ("3", "4", "five"), 2)]
    with pytest.raises(ValueError, match=r'line 1: missing key "choices" .*; where all rows have the same'):
        load_questions(path)
    for bad, message in [(["a"], "labels must hold 2 to 26"), (["a", " a"], "labels must differ")]:
        with pytest.raises(ValueError, match=message):
            load_questions(path, labels=bad)


def test_rows_to_predict_need_no_answer(tmp_path):
    bare = {"question": "q", "choices": ["a", "b"]}
    path = write(tmp_path / "rows.jsonl", bare, {**bare, "answer": None}, {**bare, "answer": "b"})
    assert [q.answer for q in load_questions(path, answered=False)] == [None, None, 1]
    with pytest.raises(ValueError, match=r'line 1: missing key "answer" \(found: question, choices\)'):
        load_questions(path)


def test_csv_and_parquet_hold_the_same_rows(tmp_path):
    rows = [GOOD, {"question": 'a "b",\nc', "choices": ["x", "y"], "answer": 0}]
    expected = load_questions(write(tmp_path / "rows.jsonl", *rows))
    with (tmp_path / "rows.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, list(GOOD))
        table.writeheader()
        table.writerows({**row, "choices": json.dumps(row["choices"])} for row in rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert load_questions(str(tmp_path / "rows.csv")) == expected
    assert load_questions(str(tmp_path / "rows.parquet")) == expected


def test_a_csv_file_of_texts_and_labels(tmp_path):
    (tmp_path / "rows.CSV").write_bytes(b"text,label\r\nit crashes,Bug\r\n\r\nthanks,\r\n")
    found = load_questions(str(tmp_path / "rows.CSV"), labels=("bug", "praise"), answered=False)
    assert [(q.question, q.answer) for q in found] == [("it crashes", 0), ("thanks", None)]


def test_missing_answers_in_parquet_leave_the_others_integers(tmp_path):
    columns = {"question": ["p", "q"], "choices": [["a", "b"]] * 2, "answer": [1.0, float("nan")]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    found = load_questions(str(tmp_path / "rows.parquet"), answered=False)
    assert [q.answer for q in found] == [1, None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"question,answer\nq,1,2\n", "line 2: 3 cells under 2 column names"),
        ("a.csv", b"question,question\nq,1\n", "two columns have the same name"),
        ("a.csv", b'question,answer\n"q\n', "line 2: not valid CSV"),
        ("a.csv", b"question\n" + b"x" * 200_000, "not valid CSV .field larger than"),
        ("a.csv", b"question,choices,answer\nq,a|b,1\n", r"choices must be a list of strings; got 'a\|b'"),
        ("a.csv", b'question,choices\nq,"[1"\n', "line 2: not valid JSON"),
        ("a.csv", b"\xff\xfe", "not UTF-8 text"),
        ("a.csv", b"", "has no rows"),
        ("a.parquet", b"question", "not valid Parquet"),
        ("a.parquet", b"PAR1" + bytes(40) + b"PAR1", "not valid Parquet"),
        ("a.jsonl", b'{"question": "a", "question": "b"}', "line 1: the key 'question' comes twice"),
        ("a.jsonl", b"x" * ((1 << 24) + 1), "has a line of 16777216 characters or more"),
        (
            "a.jsonl",
            rb'{"question": "\ud800", "choices": ["a", "b"], "answer": 0}',
            "question holds a lone surr",
        ),
    ],
)
def test_damaged_files_say_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_questions(str(tmp_path / name))


_VALUES = [None, True, -1, 0, 1, 2.5, float("nan"), float("inf"), 10**30, "", " ", "a", "A", "\0", "\ud800"]
_VALUES += [
    "1" * 5000,
    [],
    ["a", "b"],
    ["a", 1],
    [["a"], ["b"]],
    {},
    {"text": 5},
    {"text": ["a"] * 99, "label": 1},
]


@pytest.mark.parametrize("answered", [True, False])
def test_a_row_with_anything_in_it_is_a_question_or_named(answered):
    good = {"question": "q", "choices": ["a", "b"], "answer": 0}
    rows = [good | {one: x, two: y} for one in good for two in good for x in _VALUES for y in _VALUES]
    rows += [{key: good[key] for key in good if key != gone} for gone in good] + _VALUES
    taken = 0
    for row in rows:
        try:
            question = parse_question(row, "row 7", answered=answered)
        except ValueError as error:
            assert str(error).startswith("row 7: ")
        else:
            assert question.question.strip().encode() and all(c.strip().encode() for c in question.choices)
            assert question.answer in (range(len(question.choices)) if answered else (None, 0, 1))
            taken += 1
    assert taken > 20


def test_pipes_devices_and_loops_of_links_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for name in (str(tmp_path / "pipe.jsonl"), "/dev/zero"):
        with pytest.raises(ValueError, match=r"is a pipe or a device; pass a \.jsonl"):
            load_questions(name)
    with pytest.raises(ValueError, match="is not there"):
        load_questions(str(tmp_path / "loop.jsonl"))


def test_the_label_of_a_row_wins_over_the_text_of_a_choice():
    choices = {"text": ["3", "4", "1", "2"], "label": ["1", "2", "3", "4"]}
    assert parse_question({"question": "1 + 2 =", "choices": choices, "answerKey": "1"}, "row 1").answer == 0
    choices = {"text": ["B", "A"], "label": ["A", "B"]}
    assert parse_question({"question": "q", "choices": choices, "answerKey": "A"}, "row 1").answer == 0


def test_rows_as_the_hub_has_them():
    arc = {
        "question": "q",
        "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]},
        "answerKey": "3",
    }
    openbook = {"question_stem": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
    assert parse_question(arc, "row 1").answer == 2
    assert parse_question(openbook, "row 1") == Question("q", ("x", "y"), 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "choices": ["a", "b"]}, r'missing key "answer" \(found: question, choices\)'),
        ({"choices": ["a", "b"], "answer": 0}, 'missing key "question"'),
        ({"question": "q", "answer": 0}, 'missing key "choices"'),
        ({**GOOD, "question": "  "}, "question must be a non-empty string; got '  '"),
        ({**GOOD, "question": 7}, "question must be a non-empty string; got 7"),
        ({**GOOD, "choices": "ab"}, "choices must be a list of strings; got 'ab'"),
        ({**GOOD, "choices": ["a"]}, "choices must hold 2 to 26 strings; got 1"),
        ({**GOOD, "choices": ["a", ""]}, "every choice must be a non-empty string; got ''"),
        ({**GOOD, "choices": ["a", 3]}, "every choice must be a non-empty string; got 3"),
        ({**GOOD, "answer": 3}, r"answer must be an index in \[0, 2\]; got 3"),
        ({**GOOD, "answer": -1}, r"answer must be an index in \[0, 2\]; got -1"),
        ({**GOOD, "answer": True}, "answer must be an index from 0, a letter from A to C, .* got True"),
        ({**GOOD, "answer": "D"}, "answer must be .* a letter from A to C, or one of the choices; got 'D'"),
        (
            {**GOOD, "choices": ["x", "x"], "answer": "x"},
            "answer 'x' is the text of several choices; give its index",
        ),
        (["q"], "expected an object like .*; got list"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", GOOD, "", row)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: {message}"):
        load_questions(path)


def test_reading_skips_blank_lines_and_a_byte_order_mark_and_stops_at_the_limit(tmp_path):
    path = write(tmp_path / "rows.jsonl", "\ufeff" + json.dumps(GOOD), "", GOOD, "not json")
    assert len(load_questions(path, limit=2)) == 2
    with pytest.raises(
        ValueError, match=r"rows\.jsonl, line 4: not valid JSON \(Expecting value, column 1\)"
    ):
        load_questions(path)


@pytest.mark.parametrize("line", ["[" * 200_000, '{"answer": ' + "1" * 5000 + "}"], ids=["nested", "digits"])
def test_json_that_is_too_much_for_python_names_its_line(line, tmp_path):
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: JSON that Python cannot hold"):
        load_questions(write(tmp_path / "rows.jsonl", GOOD, line))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.jsonl' is not there"):
        load_questions(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ValueError, match="is a folder"):
        load_questions(str(tmp_path))
    with pytest.raises(ValueError, match="has no rows"):
        load_questions(write(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="not UTF-8 text"):
        load_questions(str(tmp_path / "latin.jsonl"))
    with pytest.raises(ValueError, match="limit must be at least 1; got 0"):
        load_questions("x.jsonl", limit=0)


class FakeHub:
    def __init__(self, rows=None, error=None):
        self.rows, self.error, self.asked = rows, error, None

    def load_dataset(self, name, config, split):
        self.asked = (name, config, split)
        if self.error:
            raise self.error
        return self.rows


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None, "test")),
        ("owner/name:ARC-Easy", ("owner/name", "ARC-Easy", "test")),
        ("owner/name:main@train[:10%]", ("owner/name", "main", "train[:10%]")),
        ("name@validation", ("name", None, "validation")),
    ],
)
def test_hub_names_carry_configuration_and_split(monkeypatch, source, asked):
    hub = FakeHub([GOOD])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert load_questions(source, split="test") == [Question("2 + 2 =", ("3", "4", "five"), 1)]
    assert hub.asked == asked


def test_hub_errors_are_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(error=ConnectionError("no route\nmore")))
    with pytest.raises(ValueError, match=r"owner/none' is neither a file .* could be loaded: no route$"):
        load_questions("owner/none")
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([GOOD, {"question": "q"}]))
    with pytest.raises(ValueError, match=r"owner/name \(train\), row 2: missing key"):
        load_questions("owner/name")
    with pytest.raises(ValueError, match=r"nor a hub data set NAME\[:CONFIG\]\[@SPLIT\]"):
        load_questions("what is this?")


def test_a_missing_datasets_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "bayeslora\[demo\]"'):
        load_questions("owner/name")


def test_split_is_a_seeded_partition():
    questions = [Question(str(i), ("a", "b"), 0) for i in range(50)]
    first, rest = split_questions(questions, 30, seed=3)
    assert (first, rest) == split_questions(questions, 30, seed=3)
    assert first != split_questions(questions, 30, seed=4)[0]
    assert sorted(int(q.question) for q in first + rest) == list(range(50))
    assert [q.question for q in first] != [str(i) for i in range(30)]
    with pytest.raises(ValueError, match=r"first must be in \[1, 49\]; got 50"):
        split_questions(questions, 50)
