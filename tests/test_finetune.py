import json

import pytest
import torch
from tiny_lm import make_model, make_tokenizer, review_rows, save_tiny

from bayeslora import metrics
from bayeslora.data import parse_question
from bayeslora.finetune import (
    _training_batches,
    add_lora,
    build_optimizer,
    check_model,
    load_model,
    pad_token,
    predict,
    resolve_device,
    resolve_dtype,
    train,
)
from bayeslora.posterior import Posterior
from bayeslora.runs import Task, load_run, read_task, save_run
from bayeslora.scoring import choice_scores, collate, encode
from bayeslora.settings import TrainSettings, check_prediction

CPU = torch.device("cpu")
TEMPLATE = "Review: {question}\nSentiment:"
# A tiny random model learns from large steps; its heads are read at rank 4.
QUICK = {
    "steps": 40,
    "batch_size": 6,
    "r": 4,
    "dropout": 0.0,
    "target_modules": ["q_proj", "v_proj", "up_proj"],
}
ADAMW = TrainSettings(optimizer="adamw", lr=2e-2, **QUICK)
IVON = TrainSettings(optimizer="ivon", lr=0.1, clip_radius=0.1, ess=1e5, hess_init=0.05, **QUICK)


@pytest.fixture(scope="module")
def encoded():
    questions = [parse_question(row, "row") for row in review_rows(36)]
    return encode(questions, make_tokenizer(), "loglik", TEMPLATE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def labels_of(encoded):
    return torch.tensor([question.answer for question in encoded])


def tiny(settings):
    return add_lora(make_model(len(make_tokenizer())), settings)


def test_all_linear_is_pefts_all_linear():
    model = tiny(TrainSettings(target_modules=["all-linear"]))
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {f"{layer}_proj" for layer in ("q", "k", "v", "o", "gate", "up", "down")}


@pytest.mark.parametrize("settings", [ADAMW, IVON], ids=["adamw", "ivon"])
def test_training_learns_and_reports(encoded, settings):
    model, seen = tiny(settings), []
    before = metrics.nll(predict(model, encoded), labels_of(encoded))
    result = train(model, encoded, settings, on_progress=seen.append)
    after = predict(model, encoded)
    assert metrics.nll(after, labels_of(encoded)) < 0.5 * before
    assert metrics.accuracy(after, labels_of(encoded)) > 0.9
    assert [(p.stage, p.step, p.total, p.loss) for p in seen] == [
        ("train", i + 1, 40, loss) for i, loss in enumerate(result.losses)
    ]
    assert len(result.step_seconds) == 40
    assert sorted(result.step_seconds)[19] <= result.seconds_per_step <= sorted(result.step_seconds)[20]
    assert result.skipped_steps == 0
    assert not model.training


@pytest.mark.parametrize("settings", [ADAMW, IVON], ids=["adamw", "ivon"])
def test_same_seed_same_run_and_the_global_generator_is_left_alone(encoded, settings):
    settings = TrainSettings(**{**settings.__dict__, "steps": 4, "dropout": 0.2})
    torch.manual_seed(123)
    expected = torch.rand(3)
    losses = []
    for seed in (123, 9):  # the second run starts from another global state
        torch.manual_seed(seed)
        model = make_model(len(make_tokenizer()))
        torch.manual_seed(seed)
        model = add_lora(model, settings)
        losses.append(train(model, encoded, settings).losses)
        if seed == 123:
            assert torch.equal(torch.rand(3), expected)
    assert losses[0] == losses[1]
    other = TrainSettings(**{**settings.__dict__, "seed": 1})
    assert train(tiny(other), encoded, other).losses != losses[0]


def test_accumulated_micro_batches_take_the_step_of_one_large_batch(encoded):
    """The same questions in one pass of 6 or three of 2: the same gradient, so the same AdamW step."""
    same_length = [e for e in encoded if e.length == encoded[0].length][:6]
    weights = []
    for batch_size, passes in ((6, 1), (2, 3)):
        options = {**ADAMW.__dict__, "batch_size": batch_size, "grad_accumulation": passes, "steps": 1}
        settings = TrainSettings(**{**options, "warmup": 0.0})
        model = tiny(settings)
        train(model, same_length, settings)
        weights.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    for one, three in zip(*weights, strict=True):
        torch.testing.assert_close(three, one, rtol=1e-3, atol=1e-5)


def test_ivon_trains_under_one_sample_a_step_and_ends_at_the_mean(encoded):
    settings = TrainSettings(**{**IVON.__dict__, "steps": 2, "batch_size": 2, "grad_accumulation": 3})
    model = tiny(settings)
    seen = []
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    weight = layer.lora_A["default"].weight
    layer.register_forward_pre_hook(lambda module, args: seen.append(weight.detach().clone()))
    result = train(model, encoded, settings)
    assert len(seen) == 6
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])
    posterior = Posterior.from_optimizer(model, result.optimizer)
    name = next(n for n, p in model.named_parameters() if p is weight)
    assert torch.equal(weight.detach(), posterior.parameters[name].mean)


def test_training_batches_are_epochs_of_similar_lengths():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 60, (570,), generator=generator).tolist()
    stream = _training_batches(lengths, 8, seed=0)
    epochs = [[next(stream) for _ in range(71)] for _ in range(2)]
    for epoch in epochs:
        flat = [i for batch in epoch for i in batch]
        assert len(flat) == len(set(flat)) == 568
        padded = sum(len(b) * max(lengths[i] for i in b) for b in epoch)
        assert padded < 1.12 * sum(lengths[i] for i in flat)
    assert epochs[0] != epochs[1]
    again = _training_batches(lengths, 8, seed=0)
    assert [next(again) for _ in range(71)] == epochs[0]
    assert sorted(next(_training_batches([3, 1, 2], 8, seed=0))) == [0, 1, 2]


def test_prediction_is_the_softmax_in_the_callers_order(encoded):
    model, progress = tiny(ADAMW), []
    probs = predict(model, encoded, max_tokens=40, on_progress=progress.append)
    with torch.no_grad():
        expected = torch.cat([choice_scores(model, collate([e], 0)).softmax(-1) for e in encoded])
    torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-6)
    assert len(progress) > 3 and progress[-1].step == progress[-1].total == len(progress)


def test_sampled_prediction_averages_named_samples_and_restores_the_mean(encoded):
    model = tiny(IVON)
    posterior = Posterior.from_optimizer(model, train(model, encoded, IVON).optimizer)
    mean = predict(model, encoded)
    average = predict(model, encoded, posterior=posterior, num_samples=3, seed=5, variance_scale=2.0)
    expected = torch.zeros_like(mean)
    for seed in (5, 6, 7):
        with posterior.sample(seed=seed, variance_scale=2.0):
            expected += predict(model, encoded) / 3
    torch.testing.assert_close(average, expected)
    assert (average - mean).abs().max() > 1e-4
    assert torch.equal(predict(model, encoded), mean)
    narrow = predict(model, encoded, posterior=posterior, num_samples=3, variance_scale=1e-6)
    assert (narrow - mean).abs().max() < (average - mean).abs().max()


def test_samples_need_a_posterior(encoded):
    with pytest.raises(ValueError, match="num_samples must be 0, or positive with a posterior; got 4"):
        predict(tiny(ADAMW), encoded, num_samples=4)


def test_a_run_survives_the_disk(encoded, folder, tmp_path):
    base, tokenizer = load_model(str(folder), device=CPU)
    model = add_lora(base, IVON)
    posterior = Posterior.from_optimizer(model, train(model, encoded, IVON).optimizer)
    task = Task(str(folder), "loglik", TEMPLATE, training=IVON.resolved(36).as_dict())
    save_run(tmp_path / "ivon", model, task, posterior)
    run = load_run(tmp_path / "ivon", device=CPU)
    assert run.task == task
    options = {"num_samples": 2, "pad_token_id": pad_token(tokenizer)}
    expected = predict(model, encoded, posterior=posterior, **options)
    torch.testing.assert_close(predict(run.model, encoded, posterior=run.posterior, **options), expected)

    save_run(tmp_path / "ivon", model, task)  # a plain adapter over it leaves no stale posterior
    run = load_run(tmp_path / "ivon", device=CPU)
    assert run.posterior is None
    torch.testing.assert_close(predict(run.model, encoded), predict(model, encoded))


def test_a_saved_run_loads_in_plain_peft_as_the_mean(encoded, folder, tmp_path):
    from peft import PeftModel

    base, _ = load_model(str(folder), device=CPU)
    model = add_lora(base, IVON)
    posterior = Posterior.from_optimizer(model, train(model, encoded, IVON).optimizer)
    save_run(tmp_path, model, Task(str(folder), "loglik", TEMPLATE), posterior)
    plain = PeftModel.from_pretrained(load_model(str(folder), device=CPU)[0], str(tmp_path))
    torch.testing.assert_close(predict(plain, encoded), predict(model, encoded), rtol=1e-4, atol=1e-6)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folder
    )


def test_task_files_that_are_not_right_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"folder '.*none' does not exist"):
        read_task(tmp_path / "none")
    with pytest.raises(ValueError, match=r"bayeslora_task\.json is missing"):
        read_task(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    task = tmp_path / "bayeslora_task.json"
    for text, message in [
        ("{", "is not a bayeslora task file"),
        ('{"format": 1}', "is not a bayeslora task file: KeyError"),
        ("[]", "is not a bayeslora task file"),
    ]:
        task.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_task(tmp_path)
    values = {"base_model": "m", "scoring": "letter", "template": "{question}{choices}", "max_length": None}
    task.write_text(json.dumps({**values, "dtype": "float32", "training": {}, "format": 2}))
    with pytest.raises(ValueError, match="has format 2; this version reads format 1"):
        read_task(tmp_path)


def test_unknown_models_are_named_before_anything_loads(tmp_path):
    (tmp_path / "file.bin").touch()
    for name, message in [
        (str(tmp_path / "none"), "does not exist; pass a hub id, a model folder or a .gguf file"),
        ("./none", "does not exist"),
        (str(tmp_path / "none.gguf"), r"model file '.*none\.gguf' does not exist"),
        (str(tmp_path), r"has no config\.json"),
        (str(tmp_path / "file.bin"), "is a file"),
        ("", "has no config|does not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_model(name)
    assert check_model("owner/name") == "owner/name"
    with pytest.raises(ValueError, match=r"model 'owner/none' could not be loaded: .+"):
        load_model("owner/none", device=CPU)


def test_devices_and_dtypes(monkeypatch):
    assert resolve_device("cpu") == CPU
    for bad in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{bad}' cannot be used here"):
            resolve_device(bad)
    assert resolve_dtype("auto", CPU) == "float32"
    assert resolve_dtype("bfloat16", CPU) == "bfloat16"
    with pytest.raises(ValueError, match="dtype must be auto, float32, bfloat16, float16; got 'int8'"):
        resolve_dtype("int8", CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer must be one of ivon, adamw; got 'sgd'"),
        ({"lr": 0.0}, "lr must be greater than 0; got 0.0"),
        ({"lr": float("nan")}, "lr must be greater than 0; got nan"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"steps": 5, "epochs": 1.0}, "pass steps or epochs, not both"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
        ({"ess": -1.0}, "ess must be greater than 0; got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"seed": 1 << 64}, r"seed must be in \[0, 2\^64\)"),
    ],
)
def test_settings_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**options)


def test_prediction_options_out_of_range_are_named():
    for options, message in [
        ({"prune": 1.0}, r"prune must be in \[0, 1\); got 1.0"),
        ({"num_samples": -1}, "num_samples must be at least 0; got -1"),
        ({"variance_scale": 0.0}, "variance_scale must be greater than 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_prediction(**options)


def test_settings_fill_in_what_depends_on_optimizer_and_data():
    ivon = TrainSettings().resolved(4957)  # OpenBookQA, for which the papers use 1e6
    assert (ivon.lr, ivon.weight_decay, ivon.ess) == (1e-2, 1e-6, pytest.approx(1e6, rel=0.02))
    assert ivon.steps == 1859
    adamw = TrainSettings(optimizer="adamw", epochs=0.5, batch_size=4, grad_accumulation=2).resolved(100)
    assert (adamw.lr, adamw.weight_decay, adamw.steps, adamw.warmup_steps) == (2e-4, 0.0, 7, 0)
    assert "ess" in ivon.as_dict() and "ess" not in adamw.as_dict()
    assert TrainSettings(steps=150).resolved(10).warmup_steps == 9


def test_ivon_gets_the_settings():
    settings = TrainSettings(lr=0.1, ess=123.0, hess_init=0.7, beta2=0.9, clip_radius=0.3, weight_decay=0.2)
    optimizer = build_optimizer(tiny(settings), settings.resolved(10))
    group = optimizer.param_groups[0]
    expected = {"lr": 0.1, "ess": 123.0, "hess_init": 0.7, "beta2": 0.9, "weight_decay": 0.2}
    assert {name: group[name] for name in expected} == expected
    assert group["clip_radius"] == 0.3
