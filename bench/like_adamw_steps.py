"""How large IVON.like_adamw's steps are beside AdamW's, and how often each diverges, at one learning rate.

    python bench/like_adamw_steps.py [--lr 0.01 0.03 0.1] [--seeds 5] [--steps 150] [--out FILE.json]

A tiny random Llama learns, by LoRA on q and v, which of four texts of one to eight words is the right one.
The scores are summed log-likelihoods, whose spread makes the loss steep, and the answers are drawn: there is
nothing to learn but the training set. Runs on the CPU in seconds a run.

A run has diverged if the training set's loss at the end is above the loss at the start. The root mean square
of a step is given as a fraction of that step's learning rate, after warm-up.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bayeslora import IVON

_WORDS, _PROMPT, _CHOICES, _LONGEST = 100, 6, 4, 8
_QUESTIONS, _BATCH, _WARMUP = 96, 8, 0.06
RATIOS = (1.0, 0.4, 0.25)

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def network(seed: int) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_WORDS,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,  # texts then differ by several nats
            pad_token_id=None,
        )
    )
    torch.manual_seed(seed)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(base, lora)


def questions() -> Batch:
    """Return ids (Q, C, T), which of them are a choice's, and right choices (Q)."""
    draw = random.Random(0)
    ids = torch.zeros(_QUESTIONS, _CHOICES, _PROMPT + _LONGEST, dtype=torch.long)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for q in range(_QUESTIONS):
        prompt = [draw.randrange(_WORDS) for _ in range(_PROMPT)]
        for c in range(_CHOICES):
            length = draw.randint(1, _LONGEST)
            text = [draw.randrange(_WORDS) for _ in range(length)]
            ids[q, c, : _PROMPT + length] = torch.tensor(prompt + text)
            scored[q, c, _PROMPT : _PROMPT + length] = True
    return ids, scored, torch.tensor([draw.randrange(_CHOICES) for _ in range(_QUESTIONS)])


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    ids, scored, answers = batch
    logs = model(input_ids=ids.flatten(0, 1)).logits[:, :-1].log_softmax(-1)
    chosen = logs.gather(2, ids.flatten(0, 1)[:, 1:, None]).squeeze(2).view(*ids.shape[:2], -1)
    return nn.functional.cross_entropy((chosen * scored[..., 1:]).sum(-1), answers)


def run(make: Callable[[list[nn.Parameter]], Any], lr: float, seed: int, steps: int) -> dict[str, float]:
    """Train with what ``make`` returns; give losses, the steps' size over lr and the weights'."""
    model, data = network(seed), questions()
    params = [p for p in model.parameters() if p.requires_grad]
    opt = make(params)
    rise, sizes = max(1, round(_WARMUP * steps)), []
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        first = float(loss_of(model, data))
    for step in range(steps):
        now = lr * ((step + 1) / rise if step < rise else (steps - step) / (steps - rise))
        for group in opt.param_groups:
            group["lr"] = now
        before = nn.utils.parameters_to_vector(params).detach()
        if isinstance(opt, IVON):
            opt.train()
        part = torch.randperm(_QUESTIONS, generator=generator)[:_BATCH]
        opt.zero_grad()
        loss_of(model, (data[0][part], data[1][part], data[2][part])).backward()
        opt.step()
        moved = nn.utils.parameters_to_vector(params).detach() - before
        if step >= rise:
            sizes.append(float(moved.square().mean().sqrt()) / now)
    with torch.no_grad():
        last = float(loss_of(model, data))
    weight = float(nn.utils.parameters_to_vector(params).detach().square().mean().sqrt())
    return {"first": first, "loss": last, "step": statistics.mean(sizes), "weight": weight}


def makers(lr: float, seed: int) -> dict[str, Callable[[list[nn.Parameter]], Any]]:
    found: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        "AdamW": lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    }
    for ratio in RATIOS:
        found[f"like_adamw, step_ratio {ratio:g}"] = lambda params, ratio=ratio: IVON.like_adamw(
            params, lr=lr, num_data=_QUESTIONS, step_ratio=ratio, snr=1.0, seed=seed
        )
    return found


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(words)
    rows = []
    for lr in arguments.lr:
        for name in makers(lr, 0):
            runs = [run(makers(lr, seed)[name], lr, seed, arguments.steps) for seed in range(arguments.seeds)]
            losses = [r["loss"] for r in runs]
            row: dict[str, Any] = {"lr": lr, "name": name, "runs": runs}
            row["diverged"] = sum(not r["loss"] <= r["first"] for r in runs)
            row |= {"loss": statistics.median(losses), "worst": max(losses)}
            row |= {key: statistics.mean(r[key] for r in runs) for key in ("first", "step", "weight")}
            rows.append(row)
            print(
                f"lr {lr:<6g} {name:28} loss {row['first']:.2f} -> {row['loss']:.3f}, worst "
                f"{row['worst']:.3f}, {row['diverged']} of {len(runs)} diverged; step {row['step']:.2f} lr, "
                f"weights {row['weight']:.3f}",
                flush=True,
            )
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
