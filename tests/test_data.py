import json
import sys

import pytest

from bayeslora.data import Question, load_questions, parse_question, split_questions

GOOD = {"question": "2 + 2 =", "choices": ["3", "4", "five"], "answer": 1}


def write(path, *rows):
    path.write_text(
        "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8"
    )
    return str(path)


@pytest.mark.parametrize("answer", [1, "B", "4", " 4 "])
def test_an_answer_is_an_index_a_letter_or_the_text(answer):
    assert parse_question({**GOOD, "answer": answer}, "row 1") == Question("2 + 2 =", ("3", "4", "five"), 1)


def test_the_text_of_a_choice_wins_over_a_letter():
    row = {"question": "Which vitamin?", "choices": ["B", "A"], "answer": "A"}
    assert parse_question(row, "row 1").answer == 1


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
