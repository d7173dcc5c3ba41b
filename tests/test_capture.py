"""A captured training step follows eager training, step for step."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from bayeslora import IVON, capture_step, patch
from bayeslora.capture import _Graph


def _batch(length, seed, device):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(50, (2, length), generator=generator).to(device)
    return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}


def _setup(device):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = patch(get_peft_model(LlamaForCausalLM(config), lora)).to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = IVON(trained, lr=0.1, ess=1e3, hess_init=0.1, clip_radius=0.1, seed=3)
    return model, opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 / (1 + step))


def _weights(model):
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters() if p.requires_grad])


def _run_eagerly(batches, device, accumulation_steps):
    model, opt, scheduler = _setup(device)
    for step in range(len(batches) // accumulation_steps):
        with opt.sampled_params(train=True):
            for part in batches[step * accumulation_steps : (step + 1) * accumulation_steps]:
                (model(**part).loss / accumulation_steps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()
        opt.zero_grad()
        scheduler.step()
    return _weights(model), opt


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_captured_run_is_the_eager_run(device, accumulation_steps):
    # Two lengths that fall into one padded shape, and a third that needs its own.
    lengths = [7, 8, 5, 8, 6, 8, 12, 16, 15, 9, 16, 8, 16, 7]
    batches = [_batch(n, i, device) for i, n in enumerate(lengths) for _ in range(accumulation_steps)]
    expected, opt_eager = _run_eagerly(batches, device, accumulation_steps)

    model, opt, scheduler = _setup(device)
    step = capture_step(
        model, opt, max_grad_norm=0.5, accumulation_steps=accumulation_steps, pad_lengths=(8, 16), warmup=2
    )
    losses = []
    for i in range(len(lengths)):
        parts = batches[i * accumulation_steps : (i + 1) * accumulation_steps]
        losses.append(step(parts if accumulation_steps > 1 else parts[0]))
        scheduler.step()
    torch.testing.assert_close(_weights(model), expected, rtol=1e-4, atol=1e-5)
    assert len({round(float(loss), 6) for loss in losses}) == len(losses)  # none is a stale copy
    assert opt.skipped_steps == opt_eager.skipped_steps == 0
    assert step.captured == (2 if device.type == "cuda" else 0)
    assert opt.state_dict()["param_groups"][0]["draws"] == len(lengths)


def _load_state(model, opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def _overwrite(model, opt):
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(0.01)


def _move(model, opt):
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.clone()


def _add_group(model, opt):
    opt.add_param_group(
        {"params": [torch.nn.Parameter(torch.ones(8, device=opt.param_groups[0]["params"][0].device))]}
    )


BETWEEN = {
    "load_state_dict": _load_state,
    "weights loaded": _overwrite,
    "moved": _move,
    "zero_grad": lambda model, opt: opt.zero_grad(set_to_none=True),
    "evaluated": lambda model, opt: opt.eval(),
    "beta2": lambda model, opt: opt.param_groups[0].update(beta2=0.9),
    "group added": _add_group,
}


@pytest.mark.parametrize("change", BETWEEN)
def test_change_between_captured_steps(change, device):
    batches = [_batch(8, i, device) for i in range(7)]
    runs = []
    for captured in (True, False):
        model, opt, scheduler = _setup(device)
        step = capture_step(model, opt, warmup=1) if captured else None
        for i, batch in enumerate(batches):
            if i == 4:
                BETWEEN[change](model, opt)
            if step is not None:
                step(batch)
            else:
                with opt.sampled_params(train=True):
                    model(**batch).loss.backward()
                opt.step()
                opt.zero_grad()
            if change != "group added":  # a scheduler knows only the groups it was made with
                scheduler.step()
        runs.append(_weights(model))
        if step is not None and device.type == "cuda":
            assert step.captured == 1
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-5)


def test_goes_eager_with_a_reason(device, caplog):
    model, _, _ = _setup(device)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING, logger="bayeslora"):
        step = capture_step(model, adamw)
    assert len(caplog.records) == 1
    assert "runs eagerly" in caplog.text
    before = _weights(model)
    assert torch.isfinite(step(_batch(8, 0, device)))
    assert not torch.equal(before, _weights(model))


@pytest.mark.gpu
def test_host_sync_in_the_model_goes_eager_and_trains_on(caplog):
    device = torch.device("cuda")
    model, opt, _ = _setup(device)

    def loss_with_sync(module, batch):
        loss = module(**batch).loss
        return loss if float(loss.detach()) < 1e9 else loss * 0

    step = capture_step(model, opt, loss_fn=loss_with_sync, warmup=1)
    with caplog.at_level(logging.WARNING, logger="bayeslora"):
        for i in range(4):
            assert torch.isfinite(step(_batch(8, i, device)))
    assert step.captured == 0
    assert "cannot be captured" in caplog.text
    assert torch.isfinite(torch.rand(2, device=device)).all()  # the generator is out of capture mode
    batches = [_batch(8, i, device) for i in range(4)]
    other, opt_other, _ = _setup(device)
    for batch in batches:
        with opt_other.sampled_params(train=True):
            other(**batch).loss.backward()
        opt_other.step()
        opt_other.zero_grad()
    torch.testing.assert_close(_weights(model), _weights(other), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_eager_steps_before_a_capture_hold_the_memory_of_one():
    """The allocator keeps memory by stream: a stream for each step would hold a step's memory each time."""
    model = torch.nn.Linear(1024, 1024, device="cuda")
    opt = torch.optim.AdamW(model.parameters(), capturable=True)
    step = capture_step(model, opt, loss_fn=lambda m, part: m(part["x"]).square().mean(), warmup=20)
    part = {"x": torch.randn(16384, 1024, device="cuda")}  # 64 MB an activation
    for _ in range(3):
        step(part)
    held = torch.cuda.memory_reserved()
    for _ in range(8):
        step(part)
    assert step.captured == 0
    assert torch.cuda.memory_reserved() < held + 2**25


class _RecordedNothing:
    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


def test_graphs_that_refer_to_old_memory_are_dropped():
    """The logic alone, on the CPU: loading a state gives the optimizer new buffers."""
    device = torch.device("cpu")
    model, opt, _ = _setup(device)
    step = capture_step(model, opt, warmup=1)
    batch = _batch(8, 0, device)
    step(batch)
    step._eager, step._run_aside = False, step._run
    graph = _RecordedNothing()
    key = tuple((name, t.shape, t.dtype) for name, t in batch.items())
    step._graphs[key] = _Graph(graph, [dict(batch)], torch.zeros(()), [], step._memory())
    step(batch)
    assert graph.replays == 1
    opt.load_state_dict(opt.state_dict())
    before = _weights(model)
    step(batch)
    assert graph.replays == 1 and step.captured == 0
    assert not torch.equal(before, _weights(model))


def test_bad_arguments(device):
    model, opt, _ = _setup(device)
    with pytest.raises(ValueError, match="accumulation_steps"):
        capture_step(model, opt, accumulation_steps=0)
    with pytest.raises(ValueError, match="warmup"):
        capture_step(model, opt, warmup=0)
    step = capture_step(model, opt, pad_lengths=(8,))
    with pytest.raises(ValueError, match="2 micro-batches"):
        step([_batch(8, 0, device)] * 2)
    with pytest.raises(ValueError, match="longer than every pad length"):
        step(_batch(9, 0, device))
    batch = _batch(7, 0, device)
    del batch["attention_mask"]
    with pytest.raises(ValueError, match="attention_mask"):
        step(batch)


def test_a_group_added_later_is_cleared_and_clipped():
    """On a CPU, where every step is eager."""
    runs = []
    for anew in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
        x = torch.randn(4, 3)
        opt = torch.optim.SGD(model[0].parameters(), lr=0.1)
        options = {"loss_fn": lambda m, batch: m(batch["x"]).square().sum(), "max_grad_norm": 0.5}
        step = capture_step(model, opt, **options)
        step({"x": x})
        opt.add_param_group({"params": list(model[1].parameters())})
        if anew:
            model.zero_grad()
            step = capture_step(model, opt, **options)
        for _ in range(3):
            step({"x": x})
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *runs))


@pytest.mark.usefixtures("fresh_accelerate")
def test_ivon_may_be_wrapped_by_accelerate(device):
    from accelerate import Accelerator

    runs = []
    for wrap in (False, True):
        model, opt, _ = _setup(device)
        given = Accelerator(cpu=device.type == "cpu").prepare(opt) if wrap else opt
        step = capture_step(model, given)
        for i in range(3):
            step(_batch(8, i, device))
        runs.append(_weights(model))
    torch.testing.assert_close(*runs)
