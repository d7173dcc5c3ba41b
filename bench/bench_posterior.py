"""S posterior samples in one pass against one sample: generation, prediction, memory.

    python bench/bench_posterior.py [--output DIR] [--rounds N]     JSON posterior_<device>.json and a table

Llama-3.2-3B's shape with random bf16 weights, LoRA r 16 on all linear layers (fp32 adapters, PEFT's
default), prompt 1 x 64, 128 new tokens, greedy; prediction of 1 x 256 tokens. About 120 s on an H100, of
which Triton compiles for 30. Rows:

- generate "PEFT" (its own forward, at the mean), "one sample" (patched), "S samples" (one pass);
- decode "captured": the same decoding with a static cache and a CUDA graph a step, without HF's loop;
- predict "one pass", "S samples" in one pass, "S in turn";
- memory of weights, adapters and posterior while one sample is in the model, and S are.

Before anything is timed, a two-layer fp32 model of the same widths must generate and predict under S
samples in one pass what it does sample by sample. Without a GPU: a toy, which checks the script only.
"""

import argparse
import gc
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from host_costs import ACTIVITIES, kernels_of
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from bayeslora import IVON, Posterior, patch, unpatch
from bayeslora.posterior_batched import SampledLayers
from bayeslora.step_benchmark import SHAPES

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPE = SHAPES["Llama-3.2-3B" if CUDA else "toy"]
DTYPE = torch.bfloat16 if CUDA else torch.float32
S, S_PREDICT = 8, 10
PROMPT, NEW, LENGTH = (64, 128, 256) if CUDA else (5, 6, 8)
FEW = min(16, NEW)
TOLERANCE = 0.05 if CUDA else 1e-4  # bf16 through 28 layers, rounded elsewhere in a graph (lora_chain.py)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def build(shape: dict[str, int], dtype: torch.dtype, ess: float) -> Posterior:
    """A patched model with random weights, and a posterior around random adapters."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        config = LlamaConfig(**shape, attn_implementation="sdpa")
        base = LlamaForCausalLM(config).to(dtype)
    base.requires_grad_(False)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = patch(get_peft_model(base, lora)).eval()
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in params:
            p.normal_(std=0.02)
    posterior = Posterior.from_optimizer(model, IVON(params, lr=0.1, ess=ess, hess_init=1.0))
    for g in posterior.parameters.values():
        g.hess.uniform_(0.5, 2.0)
    gc.collect()
    return posterior


def check() -> dict[str, float]:
    """Hold S samples in one pass against one sample at a time, at the real widths in fp32."""
    posterior = build({**SHAPE, "num_hidden_layers": 2}, torch.float32, ess=2e3)
    tokens = torch.randint(SHAPE["vocab_size"], (1, PROMPT), device=DEVICE)
    batch = {"input_ids": tokens}
    together = posterior.predict(batch, S, batched=True, average=False)
    in_turn = posterior.predict(batch, S, batched=False, average=False)
    error = float((together - in_turn).abs().max() / in_turn.max())
    apart = float((in_turn[0] - in_turn[1]).abs().max() / in_turn.max())
    if not error < 1e-3 * max(apart, 1e-3) + 1e-5:
        raise SystemExit(f"predict: {error:.2e} from one pass a sample, the samples are {apart:.2e} apart")
    settings = {**GREEDY, "max_new_tokens": 32 if CUDA else 4}
    one, many = (posterior.generate(tokens, S, batched=b, **settings) for b in (False, True))
    equal = float((one == many).float().mean())
    if not equal == 1.0:
        raise SystemExit(f"generate: {1 - equal:.1%} of the tokens are not those of one generate a sample")
    return {"predict_error": error, "samples_apart": apart}


def timed(call: Callable[[], object]) -> float:
    measure.synchronize()
    start = time.perf_counter()
    call()
    measure.synchronize()
    return time.perf_counter() - start


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, Any]:
    """Seconds of each call, in turn, round by round."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    return {name: measure.spread(s) for name, s in seconds.items()}


class Decoder:
    """Greedy decoding with a static cache: prompt and step, eager or each as a CUDA graph."""

    def __init__(self, model: Any, prompt: Tensor, rows: int) -> None:
        self.model, self.rows, self.length = model, rows, PROMPT + NEW + 8
        self.prompt = prompt.expand(rows, -1).contiguous()
        self.base = model.base_model.model
        self.cache = StaticCache(config=self.base.config, max_cache_len=self.length)
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=DEVICE)
        self.position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        self.columns = torch.arange(self.length, device=DEVICE)
        self.logits = torch.zeros(rows, self.base.config.vocab_size, device=DEVICE)
        names = inspect.signature(self.base.model.forward).parameters
        self.takes_position = "cache_position" in names  # of older transformers
        self.graphs: dict[str, Any] = {}

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        seen = self.columns[None, :] <= positions[:, None]
        inputs: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": seen[None, None].expand(self.rows, 1, -1, -1),
            "position_ids": positions[None].expand(self.rows, -1),
            "past_key_values": self.cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        if self.takes_position:
            inputs["cache_position"] = positions
        self.logits.copy_(self.base(**inputs).logits[:, -1])
        return self.logits.argmax(-1, keepdim=True)

    def read_prompt(self) -> None:
        self.token.copy_(self.forward(self.prompt, torch.arange(PROMPT, device=DEVICE)))
        self.position.fill_(PROMPT)

    def step(self) -> None:
        self.token.copy_(self.forward(self.token, self.position))
        self.position.add_(1)

    def capture(self) -> None:
        """Record the prompt's pass and a step's; without a GPU both stay eager."""
        self.cache.reset()
        self.read_prompt()
        if not CUDA:
            return
        for name, part in (("read_prompt", self.read_prompt), ("step", self.step)):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.cache.reset()
                    part()
            torch.cuda.current_stream().wait_stream(side)
            self.graphs[name] = torch.cuda.CUDAGraph()
            self.cache.reset()
            with torch.cuda.graph(self.graphs[name]):
                part()

    def run(self, captured: bool, new: int = NEW, tokens: list[Tensor] | None = None) -> list[Tensor]:
        """Decode ``new`` tokens, or read ``tokens``; return each step's logits if so, else its token."""
        captured = captured and bool(self.graphs)
        read_prompt, step = (
            (self.graphs["read_prompt"].replay, self.graphs["step"].replay)
            if captured
            else (self.read_prompt, self.step)
        )
        self.cache.reset()
        read_prompt()
        found = [(self.token if tokens is None else self.logits).clone()]
        for i in range(new - 1):
            if tokens is not None:
                self.token.copy_(tokens[i])
            step()
            found.append((self.token if tokens is None else self.logits).clone())
        return found

    def distance(self) -> float:
        """How far the graphs' logits are from the eager steps', relative, over FEW tokens of the latter's."""
        tokens = self.run(captured=False, new=FEW)
        eager, graphs = (self.run(captured, FEW, tokens) for captured in (False, True))
        return max(((g - e).norm() / e.norm()).item() for g, e in zip(graphs, eager, strict=True))


def captured_rows(posterior: Posterior, prompt: Tensor, rounds: int) -> dict[str, Any]:
    """Times of decoding by CUDA graphs, checked against the eager steps; or why it could not be."""
    layers = SampledLayers(posterior)
    try:
        one, many = (Decoder(posterior.model, prompt, rows) for rows in (1, S))
        with torch.no_grad():
            with posterior.sample(0):
                one.capture()
                errors = [one.distance()]
            with layers.active(range(S), 1.0):
                many.capture()
                errors.append(many.distance())
                if max(errors) > TOLERANCE:
                    return {"reason": f"captured logits are {errors} from the eager steps', relative"}
                # The graphs hold the samples' addresses: both replay whatever context is open.
                calls = {
                    "one sample, captured": lambda: one.run(captured=True),
                    "S samples, captured": lambda: many.run(captured=True),
                }
                if CUDA:
                    return interleaved(calls, rounds)
                many_seconds = interleaved({"S samples, captured": calls["S samples, captured"]}, rounds)
        with torch.no_grad(), posterior.sample(0):
            return interleaved({"one sample, captured": calls["one sample, captured"]}, rounds) | many_seconds
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return {"reason": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def launches(posterior: Posterior) -> dict[str, int]:
    """Kernels of one eager forward of one token a sequence, without a cache."""
    counts = {}
    layers = SampledLayers(posterior)
    for name, rows, context in (
        ("one sample", 1, posterior.sample(0)),
        ("S samples", S, layers.active(range(S), 1.0)),
    ):
        tokens = torch.zeros(rows, 1, dtype=torch.int64, device=DEVICE)
        with torch.no_grad(), context:
            posterior.model(input_ids=tokens, use_cache=False)
            measure.synchronize()
            with torch.profiler.profile(activities=ACTIVITIES) as profiler:
                posterior.model(input_ids=tokens, use_cache=False)
                measure.synchronize()
        counts[name] = sum(event.count for event in kernels_of(profiler))
    return counts


def memory() -> dict[str, float]:
    """Bytes while one sample is in the model and while S are: weights, adapters and posterior."""
    if not CUDA:
        return {}
    posterior = build(SHAPE, DTYPE, ess=1e6)
    torch.cuda.empty_cache()
    at_rest = torch.cuda.memory_allocated()
    with torch.no_grad(), SampledLayers(posterior).active(range(S), 1.0):
        posterior.model(input_ids=torch.zeros(S, 1, dtype=torch.int64, device=DEVICE), use_cache=False)
        many = torch.cuda.memory_allocated()  # with what a step of decoding keeps
    posterior._stds.clear()
    with posterior.sample(0):
        one = torch.cuda.memory_allocated()
    return {"at_rest": at_rest, "one_sample": one, "s_samples": many}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    started = time.perf_counter()
    result: dict[str, Any] = {"environment": measure.environment(), "check": check()}
    result["settings"] = {"S": S, "S_predict": S_PREDICT, "prompt": PROMPT, "new": NEW, "length": LENGTH}
    print(f"checked in {time.perf_counter() - started:.0f} s: {result['check']}")
    gc.collect()
    result["memory"] = memory()
    gc.collect()
    file = measure.result_file("posterior", arguments.output)
    posterior = build(SHAPE, DTYPE, ess=1e6)
    model = posterior.model
    prompt = torch.randint(SHAPE["vocab_size"], (1, PROMPT), device=DEVICE)
    batch = {"input_ids": torch.randint(SHAPE["vocab_size"], (1, LENGTH), device=DEVICE), "use_cache": False}

    def one_pass() -> None:
        with torch.no_grad():
            model(**batch).logits.float().softmax(-1)

    result["predict"] = interleaved(
        {
            "one pass": one_pass,
            "S samples": lambda: posterior.predict(batch, S_PREDICT, batched=True),
            "S in turn": lambda: posterior.predict(batch, S_PREDICT),
        },
        5 * arguments.rounds,
        warmup=2,
    )
    measure.write_json(file, result)
    result["launches"] = launches(posterior)
    settings = {**GREEDY, "max_new_tokens": NEW, "min_new_tokens": NEW}

    def one_sample() -> None:
        with posterior.sample(0):
            model.generate(input_ids=prompt, **settings)

    short = {**settings, "max_new_tokens": 8, "min_new_tokens": 8}
    posterior.generate(prompt, S, **short)
    calls = {"one sample": one_sample, "S samples": lambda: posterior.generate(prompt, S, **settings)}
    result["generate"] = interleaved(calls, arguments.rounds, warmup=0)
    unpatch(model)
    result["generate"] |= interleaved(
        {"PEFT": lambda: model.generate(input_ids=prompt, **settings)}, arguments.rounds, warmup=0
    )
    patch(model)
    measure.write_json(file, result)
    result["captured"] = captured_rows(posterior, prompt, arguments.rounds)
    result["seconds"] = time.perf_counter() - started
    measure.write_json(file, result)
    show(result)


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    for part, unit in (
        ("generate", "one sample"),
        ("captured", "one sample, captured"),
        ("predict", "one pass"),
    ):
        rows = result[part]
        if "reason" in rows:
            print(f"{part}: not measured: {rows['reason']}")
            continue
        for name, seconds in rows.items():
            ratio = seconds["median"] / rows[unit]["median"]
            print(f"{part:9} {name:22} {1e3 * seconds['median']:9.1f} ms   {ratio:6.2f} of {unit}")
    print("launches of a one-token forward:", result["launches"])
    if memory := result["memory"]:
        print(
            f"memory: {memory['s_samples'] / memory['one_sample'] - 1:+.2%} for S={S} over one sample;",
            memory,
        )
    print(f"{result['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
