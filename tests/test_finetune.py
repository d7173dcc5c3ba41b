import json
import os
import shutil

import pytest
import torch
from crashes import killed_at
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


def test_a_run_that_is_killed_while_it_replaces_another_is_one_of_the_two(folder, tmp_path):
    base, _ = load_model(str(folder), device=CPU)
    model = add_lora(base, ADAMW)
    tasks = [Task(str(folder), "loglik", TEMPLATE, training={"run": name}) for name in ("old", "new")]
    run, found = tmp_path / "run", []
    for count in range(0, 1000, 4):
        save_run(run, model, tasks[0])
        killed = killed_at(count + 1, lambda: save_run(run, zeroed(model), tasks[1]))
        found.append(read_task(run))  # checks that the weights are this task's
        if not killed:
            break
    assert found[0] == tasks[0] and found[-1] == tasks[1] and len(found) > 5
    assert all(task in tasks for task in found)


def zeroed(model):
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model


def test_files_of_two_runs_do_not_pass_for_one(encoded, folder, tmp_path):
    base, _ = load_model(str(folder), device=CPU)
    model = add_lora(base, IVON)
    task = Task(str(folder), "loglik", TEMPLATE)
    posterior = Posterior.from_optimizer(model, train(model, encoded, IVON).optimizer)
    save_run(tmp_path / "one", model, task, posterior)
    save_run(tmp_path / "two", zeroed(model), task)
    for name, cause in [
        ("adapter_model.safetensors", "is not the one that bayeslora_task.json was saved with"),
        ("posterior.safetensors", "is not the one that"),
    ]:
        mixed = tmp_path / f"mixed-{name}"
        shutil.copytree(tmp_path / "two", mixed)
        shutil.copy(tmp_path / "one" / name, mixed)
        with pytest.raises(ValueError, match=rf"{name} {cause}"):
            read_task(mixed)
    (tmp_path / "one" / "posterior_config.json").unlink()
    with pytest.raises(ValueError, match=r"posterior_config\.json is missing; the folder holds files of two"):
        read_task(tmp_path / "one")


def test_a_run_from_before_files_were_tied_together_loads(folder, tmp_path):
    base, _ = load_model(str(folder), device=CPU)
    save_run(tmp_path, add_lora(base, ADAMW), Task(str(folder), "loglik", TEMPLATE))
    file = tmp_path / "bayeslora_task.json"
    values = json.loads(file.read_text())
    del values["files"], values["labels"]
    file.write_text(json.dumps(values))
    assert load_run(tmp_path, device=CPU).task.template == TEMPLATE


def test_the_users_own_readme_stays_and_an_earlier_adapters_card_does_not(folder, tmp_path):
    base, _ = load_model(str(folder), device=CPU)
    model, task = add_lora(base, ADAMW), Task(str(folder), "loglik", TEMPLATE)
    (tmp_path / "README.md").write_text("mine")
    save_run(tmp_path, model, task)
    assert (tmp_path / "README.md").read_text() == "mine"
    save_run(tmp_path, model, task)
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


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


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    base, _ = load_model(str(folder), device=CPU)
    save_run(path, add_lora(base, ADAMW), Task(str(folder), "letter", "{question}{choices}"))
    return path


def test_a_folder_without_a_run_is_named(tmp_path, saved):
    with pytest.raises(ValueError, match=r"folder '.*none' does not exist"):
        read_task(tmp_path / "none")
    with pytest.raises(ValueError, match=r"bayeslora_task\.json is missing"):
        read_task(tmp_path)
    shutil.copytree(saved, tmp_path / "run")
    weights = tmp_path / "run" / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)  # opening it would wait for ever
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing"):
        read_task(tmp_path / "run")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "", '{"peft_type": "evil"}', '{"peft_type": "LORA"}'])
def test_a_damaged_adapter_names_its_folder(saved, tmp_path, text):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"the adapter in '.*run' could not be loaded: ."):
        load_run(tmp_path / "run", device=CPU)


def test_a_run_that_is_replaced_while_it_is_read_is_refused(saved, folder, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "run")

    def replaced(*args, **options):
        base, tokenizer = load_model(*args, **options)
        model = add_lora(load_model(str(folder), device=CPU)[0], ADAMW)
        save_run(tmp_path / "run", zeroed(model), Task(str(folder), "letter", "{question}{choices}"))
        return base, tokenizer

    monkeypatch.setattr("bayeslora.runs.load_model", replaced)
    with pytest.raises(ValueError, match="was written to while it was read; try again"):
        load_run(tmp_path / "run", device=CPU)


_HOSTILE = [None, True, -5, 0, 1.5, float("nan"), 10**400, "", " ", "evil", "a\0b", "\ud800", "x" * 10**5]
_HOSTILE += ["{question.__class__.__mro__}", "/etc/passwd", "../../etc", [], [1], {}, {"a": {}}, [["a"] * 30]]
_RAW = [b"", b"[]", b"5", b"{", b"[" * 100_000, bytes(range(256)), b'{"format": ' + b"1" * 5000 + b"}"]
_RAW += [b'{"format": 1, "format": 1}', b"\xff\xfe{\x00", b" " * (1 << 21), b"{}", b'{"format": 1}']


def mutated_tasks(text):
    """Task files of which a field, or everything, is not what it should be."""
    values = json.loads(text)
    for name in values:
        yield {key: value for key, value in values.items() if key != name}
        yield from ({**values, name: hostile} for hostile in _HOSTILE)
    yield from _RAW


def test_a_task_file_with_anything_in_it_is_read_or_named_in_one_line(saved, tmp_path):
    file = tmp_path / "run" / "bayeslora_task.json"
    shutil.copytree(saved, file.parent)
    taken, refused = [], []
    for mutation in mutated_tasks(file.read_text()):
        raw = mutation if isinstance(mutation, bytes) else json.dumps(mutation).encode()
        file.write_bytes(raw)
        try:
            taken.append((mutation, read_task(file.parent)))
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 130
    assert all("bayeslora_task.json" in line and "\n" not in line for line in refused)
    for mutation, task in taken:  # only what fits every field's type and range
        assert isinstance(mutation["training"], dict) and task.scoring in ("letter", "loglik", "mean_loglik")
        assert isinstance(task.base_model, str) and task.template and task.dtype == "float32"
        assert task.max_length in (None, 10**400) and task.labels is None


def test_task_files_that_are_not_right_say_why(saved, tmp_path):
    file = tmp_path / "run" / "bayeslora_task.json"
    shutil.copytree(saved, file.parent)
    good = json.loads(file.read_text())
    for change, message in [
        ({"format": 2}, "it has format 2; this version reads format 1"),
        ({"format": True}, "it has format True"),
        ({"dtype": [1]}, r"dtype must be float32, bfloat16, float16; got \[1\]"),
        ({"max_length": "x"}, "max_length must be a number of tokens or none; got 'x'"),
        ({"template": 5}, "template must be a non-empty string; got 5"),
        ({"template": "{question.__class__}"}, r"must contain \{question\}"),
        ({"labels": ["a", "a"]}, "labels must differ from each other"),
        ({"files": []}, "files must be an object; got list"),
    ]:
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=rf"task\.json is not a bayeslora task file: .*{message}"):
            read_task(file.parent)


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
        ({"preset": "best"}, "preset must be one of like-adamw, rows, commonsense, glue, gsm8k; got 'best'"),
        ({"preset": "like-adamw", "ess": 1e5}, "preset like-adamw chooses ess itself; take preset rows"),
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
    ivon = TrainSettings(preset="rows").resolved(4957)  # OpenBookQA, for which the papers use 1e6
    assert (ivon.lr, ivon.weight_decay, ivon.ess) == (1e-2, 1e-6, pytest.approx(1e6, rel=0.02))
    assert ivon.steps == 1859
    adamw = TrainSettings(optimizer="adamw", epochs=0.5, batch_size=4, grad_accumulation=2).resolved(100)
    assert (adamw.lr, adamw.weight_decay, adamw.steps, adamw.warmup_steps) == (2e-4, 0.0, 7, 0)
    assert "ess" in ivon.as_dict() and "ess" not in adamw.as_dict()
    assert TrainSettings(steps=150).resolved(10).warmup_steps == 9


def test_ivon_gets_the_settings():
    settings = TrainSettings(lr=0.1, ess=123.0, hess_init=0.7, beta2=0.9, clip_radius=0.3, weight_decay=0.2)
    optimizer = build_optimizer(tiny(settings), settings.resolved(10), 10)
    group = optimizer.param_groups[0]
    expected = {"lr": 0.1, "ess": 123.0, "hess_init": 0.7, "beta2": 0.9, "weight_decay": 0.2}
    assert {name: group[name] for name in expected} == expected
    assert group["clip_radius"] == 0.3


def test_ivon_takes_like_adamw_unless_a_value_of_its_own_is_given(encoded):
    settings = TrainSettings(steps=12, r=4)
    resolved = settings.resolved(36)
    assert (resolved.preset, resolved.lr, resolved.ess) == ("like-adamw", 2e-4, None)
    trained = train(tiny(settings), encoded, settings)
    group = trained.optimizer.param_groups[0]
    assert group["setup_num_data"] == 36 and group["setup_seen"] == group["setup_steps"]
    assert trained.ivon == {name: group[name] for name in ("ess", "hess_init", "clip_radius")}
    for given in ({"ess": 1e4}, {"hess_init": 0.1}, {"clip_radius": 0.1}):
        assert TrainSettings(**given).resolved(36).preset == "rows"


def test_presets_are_the_papers_values_and_give_way_to_options():
    glue = TrainSettings(preset="glue").resolved(100)
    assert (glue.lr, glue.beta2, glue.clip_radius, glue.hess_init, glue.ess) == (
        1e-2,
        0.9998,
        0.02,
        5e-3,
        5e6,
    )
    gsm8k = TrainSettings(preset="gsm8k", beta2=0.9, lr=1e-3).resolved(100)
    assert (gsm8k.lr, gsm8k.beta2, gsm8k.clip_radius, gsm8k.ess) == (1e-3, 0.9, 0.01, 1e7)
    commonsense = TrainSettings(preset="commonsense").resolved(2251)
    assert (commonsense.lr, commonsense.clip_radius) == (5e-4, 0.1)
    assert commonsense.ess == pytest.approx(5e5, rel=0.11)  # the papers' for ARC-Easy
