import types

import pytest
import torch
from tiny_lm import make_model, make_tokenizer

from bayeslora.data import Question
from bayeslora.scoring import EncodedQuestion, batches_by_length, choice_scores, collate, encode

QUESTIONS = [
    Question("the film was good .", ("very good", "bad", "a dull film was awful"), 0),
    Question("a film .", ("the film", "the film was bad"), 1),
    Question("the film was very very awful", ("positive", "negative"), 1),
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(len(tokenizer)).double()


def ids_of(tokenizer, text):
    return tokenizer(text)["input_ids"]


def naive_score(model, prompt, whole):
    """log p(whole after prompt), one unpadded forward pass, every token through the vocabulary."""
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(log_p[t - 1, whole[t]].item() for t in range(len(prompt), len(whole)))


def naive_scores(model, tokenizer, question, prompt, names):
    prompt_ids = ids_of(tokenizer, prompt)
    return [naive_score(model, prompt_ids, ids_of(tokenizer, f"{prompt} {name}")) for name in names]


def test_loglik_scores_are_those_of_one_plain_pass_a_choice(model, tokenizer):
    encoded = encode(QUESTIONS, tokenizer, "loglik", "Review: {question}\nAnswer:")
    scores = choice_scores(model, collate(encoded, pad_token_id=2))
    assert scores.shape == (3, 3)
    for row, question in zip(scores, QUESTIONS, strict=True):
        prompt = f"Review: {question.question}\nAnswer:"
        expected = naive_scores(model, tokenizer, question, prompt, question.choices)
        assert row[: len(expected)].tolist() == pytest.approx(expected, rel=1e-5)
        assert row[len(expected) :].eq(float("-inf")).all()


def test_letter_scores_are_the_letters_log_probabilities(model, tokenizer):
    encoded = encode(QUESTIONS, tokenizer, "letter")
    scores = choice_scores(model, collate(encoded, pad_token_id=2))
    question = QUESTIONS[0]
    prompt = "the film was good .\nA. very good\nB. bad\nC. a dull film was awful\nAnswer:"
    assert scores[0].tolist() == pytest.approx(
        naive_scores(model, tokenizer, question, prompt, ["A", "B", "C"]), rel=1e-5
    )
    assert all(len(e.sequences) == 1 for e in encoded)


def test_single_token_choices_share_one_sequence_without_the_choice(tokenizer):
    (encoded,) = encode([QUESTIONS[2]], tokenizer, "loglik", "Review: {question}\nSentiment:")
    prompt = ids_of(tokenizer, "Review: the film was very very awful\nSentiment:")
    assert encoded.sequences == (tuple(prompt),)
    negative, positive = ids_of(tokenizer, " negative") + ids_of(tokenizer, " positive")
    assert encoded.targets == (((0, len(prompt) - 1, positive),), ((0, len(prompt) - 1, negative),))


def test_a_choice_that_begins_another_is_read_off_the_longer_one(tokenizer):
    (encoded,) = encode([QUESTIONS[1]], tokenizer, "loglik")
    assert len(encoded.sequences) == 1
    assert [len(tokens) for tokens in encoded.targets] == [2, 4]


def test_scoring_starts_where_prompt_and_choices_part():
    """A tokenizer that merges across the boundary: the merged token belongs to the choice."""

    def tokenizer(texts, **kwargs):
        table = {"ab": [1, 2], "ab c": [1, 7], "ab d": [1, 2, 8]}
        return {"input_ids": [table[t] for t in texts]}

    (encoded,) = encode([Question("ab", ("c", "d"), 0)], tokenizer, "loglik", "{question}")
    assert encoded == EncodedQuestion(((1, 2),), (((0, 0, 7),), ((0, 0, 2), (0, 1, 8))), 0)


def test_right_padding_changes_no_score_and_no_gradient(model, tokenizer):
    encoded = encode(QUESTIONS, tokenizer, "loglik")
    together = choice_scores(model, collate(encoded, pad_token_id=2))
    alone = [choice_scores(model, collate([e], pad_token_id=2)) for e in encoded]
    for row, one in zip(together, alone, strict=True):
        torch.testing.assert_close(row[: one.shape[1]], one[0], rtol=1e-5, atol=1e-6)
    other = collate(encoded, pad_token_id=5)
    assert other.input_ids.ne(collate(encoded, pad_token_id=2).input_ids).any()
    torch.testing.assert_close(choice_scores(model, other), together, rtol=0, atol=0)


def test_gradient_is_finite_and_equals_the_naive_one(tokenizer):
    question, prompt = QUESTIONS[0], "Review: the film was good .\nAnswer:"
    grads = []
    for naive in (False, True):
        model = make_model(len(tokenizer)).double()
        if naive:
            rows = []
            for choice in question.choices:
                whole = ids_of(tokenizer, f"{prompt} {choice}")
                log_p = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
                start = len(ids_of(tokenizer, prompt))
                rows.append(sum(log_p[t - 1, whole[t]] for t in range(start, len(whole))))
            scores = torch.stack(rows)[None]
        else:  # beside a question with fewer choices, so that -inf padding is in the batch
            encoded = encode(QUESTIONS[:2], tokenizer, "loglik", "Review: {question}\nAnswer:")
            scores = choice_scores(model, collate(encoded, pad_token_id=2))[:1]
        torch.nn.functional.cross_entropy(scores, torch.tensor([0])).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, rtol=1e-4, atol=1e-7, msg=name)


def test_only_the_needed_positions_meet_the_vocabulary(model, tokenizer):
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    batch = collate(encode(QUESTIONS, tokenizer, "letter"), pad_token_id=2)
    choice_scores(model, batch)
    hook.remove()
    assert seen == [(3, len(set(batch.attention_mask.sum(1).tolist())), len(tokenizer))]


def test_a_model_without_logits_to_keep_gives_the_same_scores(model, tokenizer):
    class Plain(torch.nn.Module):
        def forward(self, input_ids, attention_mask, use_cache):
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
            return types.SimpleNamespace(logits=logits)

    batch = collate(encode(QUESTIONS, tokenizer, "loglik"), pad_token_id=2)
    torch.testing.assert_close(choice_scores(Plain(), batch), choice_scores(model, batch))


def test_mean_loglik_is_the_loglik_a_token(model, tokenizer):
    """Also beside a question with fewer choices, whose missing one stays at -inf."""
    one = Question("the film was", ("very very good", "bad"), 0)
    both = [encode([QUESTIONS[0], one], tokenizer, method) for method in ("loglik", "mean_loglik")]
    summed, mean = (choice_scores(model, collate(encoded, pad_token_id=2)) for encoded in both)
    assert both[1][1].divisors == [3, 1] and both[0][1].divisors == [1, 1]
    torch.testing.assert_close(mean[1, :2], summed[1, :2] / torch.tensor([3, 1]))
    assert mean[1, 2:].tolist() == [-torch.inf] * (mean.shape[1] - 2)


def test_max_length_cuts_the_prompt_from_its_start_and_keeps_bos(model, tokenizer):
    question = Question("very " * 30 + "good", ("positive", "negative"), 0)

    def with_bos(texts, **kwargs):
        return {"input_ids": [[1, *ids] for ids in tokenizer(texts)["input_ids"]]}

    with_bos.bos_token_id = 1
    (whole,) = encode([question], with_bos, "loglik")
    (cut,) = encode([question], with_bos, "loglik", max_length=12)
    assert len(cut.sequences[0]) == 12
    assert cut.sequences[0] == (1, *whole.sequences[0][-11:])
    assert [t[0][2] for t in cut.targets] == [t[0][2] for t in whole.targets]
    assert cut.targets[0][0][1] == 11
    assert (whole.dropped, cut.dropped) == (0, len(whole.sequences[0]) - 12)
    long = Question("good", ("very " * 9 + "good", "bad"), 0)
    with pytest.raises(ValueError, match="max_length=5 tokens is too short"):
        encode([long], with_bos, "loglik", max_length=5)
    with pytest.raises(ValueError, match="max_length must be at least 2 tokens; got 1"):
        encode([long], with_bos, "loglik", max_length=1)


def test_a_question_without_an_answer_is_scored_and_costs_nothing(model, tokenizer):
    unknown = Question(QUESTIONS[0].question, QUESTIONS[0].choices, None)
    batch = collate(encode([unknown, QUESTIONS[1]], tokenizer), pad_token_id=2)
    scores = choice_scores(model, batch)
    assert torch.equal(scores[0], choice_scores(model, collate(encode(QUESTIONS[:2], tokenizer), 2))[0])
    loss = torch.nn.functional.cross_entropy
    assert torch.equal(loss(scores, batch.labels), loss(scores[1:], batch.labels[1:]))


def test_placeholders_in_a_question_are_left_alone(tokenizer):
    question = Question("what is {choices} ?", ("good", "bad"), 0)
    (encoded,) = encode([question], tokenizer, "letter")
    assert encoded.sequences[0][:4] == tuple(ids_of(tokenizer, "what is {choices} ?"))[:4]
    text = tokenizer.decode(encoded.sequences[0])
    assert text.count("good") == 1


@pytest.mark.parametrize(
    ("method", "template", "message"),
    [
        ("words", None, "scoring must be one of letter, loglik, mean_loglik; got 'words'"),
        ("loglik", "Answer:", r"must contain \{question\}"),
        ("letter", "{question} Answer:", r"template for scoring 'letter' must contain \{choices\}"),
    ],
)
def test_bad_method_or_template(tokenizer, method, template, message):
    with pytest.raises(ValueError, match=message):
        encode(QUESTIONS, tokenizer, method, template)


def test_batches_hold_every_question_once_within_the_budget():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (200,), generator=generator).tolist()
    encoded = [EncodedQuestion((tuple(range(n)),) * (1 + n % 2), ((), ()), 0) for n in lengths]
    groups = batches_by_length(encoded, max_tokens=256, max_questions=8)
    assert sorted(i for group in groups for i in group) == list(range(200))
    for group in groups:
        width = max(encoded[i].length for i in group)
        padded = width * sum(len(encoded[i].sequences) for i in group)
        assert len(group) == 1 or padded <= 256
        assert len(group) <= 8
    widths = [max(encoded[i].length for i in group) for group in groups]
    assert widths == sorted(widths, reverse=True)
