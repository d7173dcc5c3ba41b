"""Steps on quantized and on compiled bases: forward and backward, patched against PEFT's, in one run.

    python bench/bench_bases.py --out FOLDER [--only quantized|compiled] [--modes ...] [--lengths ...]

quantized: a Llama-3.2-3B shape on bitsandbytes int8 and nf4 (skipped without bitsandbytes), PEFT's layers
against patched ones on the same base, adapters in PEFT's default fp32, all-linear r16; about 90 s on one GPU.
compiled: eight layers of that shape under ``torch.compile`` (inductor): the base alone, PEFT, patched, of
8 x 512 and 8 x 256 tokens, in both of inductor's modes that do not search for kernels, "default" and
"reduce-overhead" (which replays CUDA graphs); about 100 s for one mode and length. On a CPU a toy checks
the script and measures nothing.

Before a pair is timed, the patched layers' loss and adapter gradients must be PEFT's to within TOLERANCE, or
what PEFT's own move by when its adapters are rounded to bf16.
"""

import argparse
import copy
import gc
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import chain, product
from pathlib import Path

import torch
from bench_model_step import (
    ALL_LINEAR,
    CUDA,
    DEVICE,
    LLAMA_3B,
    TOY,
    Row,
    _clear_gradients,
    _distance,
    _gradients,
    build_base,
)
from measure import environment, spread, write_json
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bayeslora import patch, unpatch

TOLERANCE = 0.05  # roundings of 2^-9 through 28 layers; a wrong term gives 0.5 and more
ROUNDINGS = 1.5  # of those that PEFT makes itself with bf16 adapters
ROUNDS = 40 if CUDA else 2
LENGTHS = (512, 256) if CUDA else (16,)
MODES = ("default", "reduce-overhead")
WARMUPS = 3


def quantize(model: nn.Module, kind: str) -> nn.Module:
    """Put bitsandbytes layers in the place of the decoder's linear ones."""
    import bitsandbytes as bnb

    linear = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and "lm_head" not in n]
    for name, old in linear:
        data = old.weight.data.cpu()  # moving it to the device is what quantizes it
        if kind == "int8":
            new = bnb.nn.Linear8bitLt(
                old.in_features, old.out_features, bias=False, has_fp16_weights=False, device="meta"
            )
            new.weight = bnb.nn.Int8Params(data, requires_grad=False, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(
                old.in_features,
                old.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            new.weight = bnb.nn.Params4bit(data, requires_grad=False, quant_type="nf4", module=new)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new.to(DEVICE))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "int8", kind == "nf4"
    return model


def with_adapters(base: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=ALL_LINEAR)).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:  # PEFT's zeros would hide half of the gradients
            nn.init.normal_(p, std=0.02)
    return model


def twin(model: nn.Module) -> nn.Module:
    """Copy the modules, sharing every parameter and buffer."""
    memo = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


class Layers(Row):
    """PEFT's or the patched layers of one model, shared by both rows: int8 layers keep state of their own."""

    def __init__(self, variant: str, model: nn.Module, tokens: Tensor) -> None:
        super().__init__(variant, model, tokens)
        self._step = self.step
        self.step = self.first_switch

    def switch(self) -> None:
        (patch if self.variant == "patched" else unpatch)(self.model)

    def first_switch(self) -> Tensor:
        self.switch()
        return self._step()

    def run(self) -> float:
        self.switch()
        self.step = self._step  # untimed above
        try:
            return super().run()
        finally:
            self.step = self.first_switch


def check(reference: Row, row: Row, tolerance: float = TOLERANCE) -> float:
    """Return the distance of the row's gradients from the reference's; raise where it is no rounding."""
    losses, gradients = [], []
    for each in (reference, row):
        _clear_gradients(each.model)
        losses.append(each.step().item())
        gradients.append(_gradients(each.model))
        _clear_gradients(each.model)
    distance = _distance(gradients[1], gradients[0])
    if distance > tolerance or abs(losses[1] / losses[0] - 1) > 1e-2:
        raise SystemExit(
            f"{row.variant}: gradients {distance:.3g} apart, more than {tolerance:.3g}; losses {losses}"
        )
    return distance


def own_rounding(row: Row) -> float:
    """Return how far PEFT's gradients move when its adapters are rounded to bf16.

    int8 layers round activations to 255 steps, so a rounding before them moves what follows by whole
    steps: there the patched layers can be no nearer to PEFT's than PEFT's are to themselves.
    """
    gradients = []
    adapters = [p for name, p in row.model.named_parameters() if "lora_" in name]
    exact = [p.data for p in adapters]
    for dtype in (torch.float32, torch.bfloat16):
        for p, value in zip(adapters, exact, strict=True):
            p.grad = None
            p.data = value.to(dtype)
        row.step()
        gradients.append(_gradients(row.model))
    for p, value in zip(adapters, exact, strict=True):
        p.grad = None
        p.data = value
    return _distance(gradients[1], gradients[0])


def timed(title: str, rows: list[Row], pairs: list[tuple[str, str]], checked: dict[str, float]) -> dict:
    for row in rows:
        row.measure_peak()
        for _ in range(2):
            row.run()
    for _ in range(ROUNDS):
        for row in rows:
            row.seconds.append(row.run())
    by_name = {row.variant: row for row in rows}
    ratios = {}
    for a, b in pairs:
        both = zip(by_name[a].seconds, by_name[b].seconds, strict=True)
        ratios[f"{a} / {b}"] = spread([x / y for x, y in both])
    print(f"\n{title}")
    for row in rows:
        print(f"  {row.variant:24} {1e3 * spread(row.seconds)['median']:8.2f} ms  {row.peak_gb:6.1f} GB")
    for name, ratio in ratios.items():
        print(f"  {name:40} {ratio['median']:.4f}  [{ratio['q1']:.4f}, {ratio['q3']:.4f}]")
    return {
        "title": title,
        "seconds": {row.variant: spread(row.seconds) for row in rows},
        "peak_gb": {row.variant: row.peak_gb for row in rows},
        "ratios": ratios,
        "gradient_distance": checked,
    }


def tokens_of(shape: dict[str, int], length: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    size = (8, length) if CUDA else (2, 16)
    return torch.randint(shape["vocab_size"], size, generator=generator).to(DEVICE)


def quantized(shape: dict[str, int]) -> Iterator[dict]:
    if find_spec("bitsandbytes") is None:
        print("quantized: skipped, bitsandbytes is not installed")
        return
    for kind in ("int8", "nf4"):
        model = with_adapters(quantize(build_base(shape), kind))
        rows: list[Row] = [Layers(name, model, tokens_of(shape)) for name in ("PEFT", "patched")]
        patch(model)
        fused = sum(type(m).__module__ == "bayeslora.lora_quantized" for m in model.modules())
        if fused != shape["num_hidden_layers"] * len(ALL_LINEAR):
            raise SystemExit(f"{kind}: {fused} layers are fused")
        rounding = own_rounding(rows[0])
        distance = check(rows[0], rows[1], max(TOLERANCE, ROUNDINGS * rounding))
        checked = {"patched": distance, "PEFT's own rounding": rounding}
        yield timed(f"{kind}, all-linear r16", rows, [("patched", "PEFT")], checked)
        del model, rows
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def compiled(shape: dict[str, int], modes: Sequence[str], lengths: Sequence[int]) -> Iterator[dict]:
    shape = {**shape, "num_hidden_layers": min(8, shape["num_hidden_layers"])}
    base = build_base(shape)
    model = with_adapters(twin(base))
    for length, mode in product(lengths, modes):
        torch._dynamo.reset()  # a graph for this length, not one for any
        yield _compiled_at(length, mode, base, model, shape)


def _compiled_at(length: int, mode: str, base: nn.Module, model: nn.Module, shape: dict[str, int]) -> dict:
    tokens = tokens_of(shape, length)
    kinds = {"base": base, "PEFT": model, "patched": patch(twin(model))}
    eager = {name: Row(name, module, tokens) for name, module in kinds.items()}
    rows = []
    for name, module in kinds.items():
        row = Row(f"{name} compiled", module, tokens)
        whole = torch.compile(module, mode=mode) if CUDA else torch.compile(module, backend="aot_eager")

        def step(whole: nn.Module = whole) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            loss = whole(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            return loss.detach()

        row.step = step
        rows.append(row)
    for row in rows:
        for _ in range(WARMUPS):  # "reduce-overhead" captures at the second and third step
            row.step()
            _clear_gradients(row.model)
    checked = {row.variant: check(eager["PEFT"], row) for row in rows[1:]}
    pairs = [("patched compiled", "base compiled"), ("PEFT compiled", "base compiled")]
    name = "compiled" if mode == "default" else f"compiled, {mode}"
    layers = shape["num_hidden_layers"]
    title = f"{name}, {layers} layers, all-linear r16, {tokens.shape[0]}x{tokens.shape[1]}"
    return timed(title, rows, pairs, checked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file")
    parser.add_argument("--only", choices=["quantized", "compiled"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of the compiled rows")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="of the compiled rows")
    arguments = parser.parse_args()
    shape = LLAMA_3B if CUDA else TOY
    parts = {
        "quantized": quantized,
        "compiled": partial(compiled, modes=arguments.modes, lengths=arguments.lengths),
    }
    names = [arguments.only] if arguments.only else list(parts)
    kind = "".join(c if c.isalnum() else "_" for c in environment()["device"]).strip("_").lower()
    file = arguments.out / f"bases_{'_'.join(names)}_{kind}.json"
    rows: list[dict] = []
    for row in (row for name in names for row in parts[name](shape)):
        rows.append(row)
        write_json(file, {"environment": environment(), "rows": rows})
    print(f"\n{file}")


if __name__ == "__main__":
    main()
