import math

import pytest
import torch
from tiny_lm import make_model, make_tokenizer, review_rows

from bayeslora import advice, metrics
from bayeslora.data import Question, parse_question
from bayeslora.finetune import predict
from bayeslora.scoring import TEMPLATES, encode

QUESTIONS = [parse_question(row, "row") for row in review_rows(40)]


def looks(**known):
    return [advice.Look(name, *values) for name, values in known.items()]


def test_a_look_is_what_the_base_model_predicts_on_evenly_spaced_rows():
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    found = [advice.look(model, tokenizer, QUESTIONS, *way) for way in TEMPLATES.items()]
    asked = [QUESTIONS[i * 40 // 32] for i in range(32)]
    labels = torch.tensor([question.answer for question in asked])
    for one in found:
        probs = predict(model, encode(asked, tokenizer, one.scoring))
        assert (one.accuracy, one.nll) == pytest.approx(
            (metrics.accuracy(probs, labels), metrics.nll(probs, labels))
        )
    assert [one.scoring for one in found] == ["letter", "loglik", "mean_loglik"]
    assert advice.few([1, 2, 3]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("seen", "chosen"),
    [
        ({"letter": (0.9, 0.3), "loglik": (0.6, 0.6), "mean_loglik": (0.6, 0.6)}, "letter"),
        ({"letter": (0.5, 0.7), "loglik": (0.8, 0.9), "mean_loglik": (0.8, 0.5)}, "mean_loglik"),
        ({"letter": (0.84, 2.0), "loglik": (0.81, 0.4), "mean_loglik": (0.6, 0.1)}, "loglik"),
        ({"letter": (0.55, 0.7), "loglik": (0.5, 3.0), "mean_loglik": (0.4, 2.0)}, "mean_loglik"),
        ({"letter": (0.4, 0.7)}, "letter"),
    ],
    ids=["most accurate", "sure of itself", "as accurate but less costly", "all guess", "no other"],
)
def test_the_scoring_is_the_most_accurate_one_and_of_equals_the_least_costly(seen, chosen):
    scoring, why = advice.choose(looks(**seen), QUESTIONS)
    assert scoring == chosen
    assert why.startswith("of 32 rows the base model gets ") and "and guessing 50%" in why
    assert ("none is clearly better" in why) == (max(seen.values())[0] < 0.58)


def test_a_prompt_says_which_scorings_it_serves():
    assert advice.ways_to_score(None) == TEMPLATES
    assert list(advice.ways_to_score("{question} {choices}")) == ["letter"]
    assert list(advice.ways_to_score("{question}:")) == ["loglik", "mean_loglik"]
    with pytest.raises(ValueError, match=r"must contain \{question\}"):
        advice.ways_to_score("Answer:")


def test_rows_without_fault_are_not_mentioned():
    encoded = encode(QUESTIONS, make_tokenizer())
    assert advice.about_rows(QUESTIONS, encoded, 256) == advice.about_rows([], [], None) == []
    assert len(advice.about_rows(QUESTIONS, encoded, 3)) == 1


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([2.0] * 5 + [0.5] * 5, []),
        ([0.3] * 95 + [0.7] * 10, ["a lower --lr"]),
        ([2.0] * 5 + [0.7] * 5, ["more --epochs or a higher --lr"]),
        ([1.0, math.nan, math.nan], ["a lower --lr"]),
    ],
    ids=["learned", "rose", "fell too little", "diverged"],
)
def test_a_loss_that_ends_at_guessing_is_told_with_what_to_try(losses, said):
    found = advice.about_training(losses, QUESTIONS, "loglik")
    assert len(found) == len(said) and all(text in line for text, line in zip(said, found, strict=True))
    assert all("guessing (0.69)" in line and "another --scoring than loglik" in line for line in found)


def test_guessing_costs_the_log_of_each_questions_choices():
    two, four = (Question("q", tuple("abcd"[:n]), 0) for n in (2, 4))
    (line,) = advice.about_training([9.0] * 5, [two, four], "letter")
    assert f"guessing ({(math.log(2) + math.log(4)) / 2:.2f})" in line and "--scoring mean_loglik" in line


def probabilities(right):
    return torch.tensor([[p, 1 - p] for p in right])


def test_samples_are_far_behind_only_beyond_chance_and_by_more_than_a_little():
    labels = torch.zeros(40, dtype=torch.long)
    sure = probabilities([0.9] * 40)
    for samples, far in [
        ([0.9] * 40, False),
        ([0.85] * 40, False),  # behind, by 0.06 nats
        ([0.7] * 40, True),
        ([0.9] * 39 + [1e-9], False),  # one row, far: half a nat, and within two standard errors
        ([0.9] * 30 + [0.4] * 10, True),  # a quarter of the answers lost
        ([0.95] * 40, False),  # ahead
    ]:
        found = advice.about_samples(sure, probabilities(samples), labels, 1e4)
        assert len(found) == far, samples
        assert all("--variance-scale 0.1" in line and "(it was 1e+04)" in line for line in found)
    assert (
        advice.about_samples(sure[:1], probabilities([0.1]), labels[:1], 1.0) == []
    )  # one row tells nothing
