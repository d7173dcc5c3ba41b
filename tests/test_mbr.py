"""Minimum Bayes risk decoding: majority votes, GSM8K answers, chrF against sacrebleu, bad input."""

import math
import random
import re

import pytest
import torch
from sacrebleu.metrics import CHRF

from bayeslora import mbr


def test_majority_vote_by_hand():
    choice = mbr.decode(["x 2", "y 3", "z 3", "w"], answer=mbr.gsm8k_flexible)
    assert (choice.index, choice.text, choice.answer) == (1, "y 3", "3")
    assert choice.expected_utility.tolist() == [0.25, 0.5, 0.5, 0.0]
    weighted = mbr.decode(["x 2", "y 3", "z 3", "w"], answer=mbr.gsm8k_flexible, weights=[5, 1, 1, 9])
    assert weighted.answer == "2"
    assert weighted.expected_utility.tolist() == [5 / 16, 2 / 16, 2 / 16, 0.0]


def test_no_answer_anywhere_is_the_first_candidate():
    choice = mbr.decode(["no", "numbers"], answer=mbr.gsm8k_strict)
    assert choice.index == 0 and choice.answer is None
    assert choice.expected_utility.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 42", "42", "42"),
        ("#### -1,234.50 and #### 3", "-1234.50", "3"),
        ("so $1,000.", None, "1000"),
        ("the answer is 7", None, "7"),
        ("####42", None, "42"),
        ("7 apples cost -3 dollars", None, "-3"),
        ("well ... then", None, ".."),  # the harness's pattern takes points for a number
        ("nothing", None, None),
    ],
)
def test_gsm8k_answers_are_the_harness_s(text, strict, flexible):
    assert mbr.gsm8k_strict(text) == strict
    assert mbr.gsm8k_flexible(text) == flexible


def _texts(count, seed=0):
    rng = random.Random(seed)
    words = ["the", "a", "cat", "dog", "sat", "barked", "on", "under", "mat", "tree", "über", "12", "!"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(count)] + ["x", "ab"]


def test_numbers_are_normalized_as_the_harness_does():
    """lm-evaluation-harness removes these patterns from an answer, in this order, and folds its case."""
    generator = random.Random(0)
    for _ in range(2000):
        text = "".join(generator.choices("0123456789,.$-# \n", k=12))
        for pattern, found in (
            (r"#### (\-?[0-9\.\,]+)", mbr.gsm8k_strict),
            (r"-?[$0-9.,]{2,}|-?[0-9]+", None),
        ):
            numbers = re.findall(pattern, text)
            number = (numbers[0] if found else numbers[-1]).strip() if numbers else None
            for ignored in (",", r"\$", r"(?s).*#### ", r"\.$") if numbers else ():
                number = re.sub(ignored, "", number)
            assert (found or mbr.gsm8k_flexible)(text) == number


def test_a_number_of_a_million_digits_takes_time_linear_in_them():
    """In quadratic time, minutes."""
    assert mbr.gsm8k_flexible("so " + "1" * 10**6 + ".") == "1" * 10**6
    assert mbr.gsm8k_strict("#### " + "1," * 10**6) == "1" * 10**6


def test_chrf_is_sacrebleus():
    texts, metric = _texts(12), CHRF()
    found = mbr.chrf(texts, texts[3:])
    expected = [[metric.sentence_score(h, [r]).score / 100 for r in texts[3:]] for h in texts]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_a_vectorised_and_a_pairwise_utility_agree_and_see_each_text_once():
    texts = _texts(10) * 3
    seen = []

    def one(hypothesis, reference):
        seen.append((hypothesis, reference))
        return float(mbr.chrf([hypothesis], [reference]))

    weights = torch.rand(len(texts), generator=torch.Generator().manual_seed(0))
    whole = mbr.decode(texts, utility=mbr.chrf, weights=weights)
    pairs = mbr.decode(texts, utility=one, pairwise=True, weights=weights)
    assert len(seen) == len(set(seen)) == len(set(texts)) ** 2
    torch.testing.assert_close(whole.expected_utility, pairs.expected_utility)
    assert whole.index == pairs.index
    full = mbr.expected_utility(mbr.chrf(texts, texts), weights)
    torch.testing.assert_close(whole.expected_utility, full)


def test_512_candidates():
    texts = _texts(510, seed=3)
    choice = mbr.decode(texts, utility=mbr.chrf)
    assert choice.expected_utility.shape == (512,)
    assert choice.expected_utility[choice.index] == choice.expected_utility.max()


@pytest.mark.parametrize(
    ("candidates", "settings", "match"),
    [
        ([], {}, "at least one text"),
        ("text", {}, "sequence of at least one text"),
        (["a", ""], {}, "candidate 1 is ''"),
        (["a", " \n"], {}, "candidate 1 is"),
        (["a", None], {}, "candidate 1 is None"),
        (["a", "b"], {"weights": [1.0]}, r"weights have shape \(1,\); pass \(2,\)"),
        (["a", "b"], {"weights": [1.0, -1.0]}, "weights must be finite"),
        (["a", "b"], {"weights": [0.0, 0.0]}, "weights must be finite"),
        (["a", "b"], {"weights": [1.0, math.nan]}, "weights must be finite"),
        (
            ["a", "b"],
            {"utility": lambda h, r: math.nan, "pairwise": True},
            "hypothesis 0 against ref.* is nan",
        ),
        (["a", "b"], {"utility": lambda h, r: [[1, 2], [3, math.inf]]}, "hypothesis 1 against reference 1"),
        (["a", "b"], {"utility": lambda h, r: [1.0, 2.0]}, r"returned shape \(2,\); return \(2, 2\)"),
        (["a", "b"], {"utility": lambda h, r: [[1, 2], [1, 2], [5, 6]]}, r"returned shape \(3, 2\)"),
        (["a", "b"], {"utility": lambda h, r: 1.0}, "pass pairwise=True"),
    ],
)
def test_bad_input(candidates, settings, match):
    with pytest.raises(ValueError, match=match):
        mbr.decode(candidates, **settings)


def test_answer_and_utility_exclude_each_other():
    with pytest.raises(TypeError, match="not both"):
        mbr.decode(["a"], answer=str, utility=mbr.chrf)


def test_without_sacrebleu_the_error_says_what_to_install(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(mbr, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"bayeslora\[mbr\]"):
        mbr.chrf(["a"], ["b"])
