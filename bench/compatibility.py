"""README's compatibility table: what is supported, and the tests that show it.

``python bench/compatibility.py`` runs the tests of every row (two minutes on two cores) and, if all of them
pass, writes ``results/compatibility.json`` with the versions they ran on; ``readme_tables.py`` makes the
table from that file, and ``tests/test_readme.py`` holds it against the rows and the tests of this checkout.
"""

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "compatibility.json"
ALWAYS = ("torch", "transformers", "peft")


class Row(NamedTuple):
    """One line of the table."""

    what: str
    how: str
    tests: tuple[str, ...]
    packages: tuple[str, ...] = ()


ROWS = (
    Row(
        "HF Trainer",
        "`optimizers=(opt, None)` or `optimizer_cls_and_kwargs`; a hand-written loop's losses, bit for bit",
        (
            "test_trainers.py::test_hf_trainer",
            "test_trainer.py::test_resume_matches_the_uninterrupted_run_exactly",
        ),
        ("accelerate",),
    ),
    Row(
        "evaluation, best model, early stop, `save_only_model`",
        "`callbacks=[bayeslora.PosteriorCallback()]`; every checkpoint is the mean, the posterior beside it",
        ("test_trainers.py::test_every_checkpoint_is_a_posterior_and_the_best_comes_back",),
    ),
    Row("TRL `SFTTrainer`", "as HF Trainer", ("test_trainers.py::test_trl_sft_trainer",), ("trl",)),
    Row(
        "accelerate loop",
        "`opt.train()` before the forward pass",
        ("test_trainers.py::test_accelerate_loop",),
        ("accelerate",),
    ),
    Row(
        "Lightning",
        "`callbacks=[bayeslora.LightningCallback()]`",
        ("test_trainers.py::test_lightning",),
        ("lightning",),
    ),
    Row(
        "scripts for ivon-opt",
        "change the import",
        ("test_ivon_opt_scripts.py::test_the_published_loop_with_only_the_import_changed",),
        ("ivon-opt",),
    ),
    Row(
        "fp32, bf16, autocast, fp16 + `GradScaler`",
        "adapters in fp32 or the base's dtype",
        (
            "test_precision_and_memory.py::test_every_precision_trains_as_fp32_does",
            "test_ivon.py::test_grad_scaler",
        ),
    ),
    Row(
        "gradient checkpointing (both kinds), activation offload",
        "as without",
        ("test_precision_and_memory.py::test_memory_savers_change_no_loss",),
    ),
    Row(
        "bitsandbytes int8, nf4",
        "base product theirs, LoRA part fused",
        ("test_quantized.py::test_outputs_and_gradients_are_pefts",),
        ("bitsandbytes",),
    ),
    Row(
        "GPTQ, AWQ",
        "PEFT's forward, one log line; IVON as ever",
        ("test_quantized.py::test_gptq_and_awq_are_left_to_peft_with_a_line",),
    ),
    Row(
        "`torch.compile`, dynamic shapes",
        "one graph; at most one more a new length",
        (
            "test_precision_and_memory.py::test_a_compiled_model_recompiles_at_most_once_a_new_length",
            "test_lora_compile.py::test_a_model_compiles_into_one_graph",
        ),
    ),
    Row(
        "DDP, shared noise",
        "as it is; ranks bit-identical, no message beyond DDP's",
        (
            "test_distributed.py::test_shared_noise_keeps_the_ranks_bit_identical",
            "test_distributed_trainers.py::test_hf_trainer_under_ddp_keeps_the_ranks_identical_and_saves_the_posterior",
        ),
        ("accelerate",),
    ),
    Row(
        "`no_sync`, uneven batches, a rank that dies",
        "as with any optimizer; resume from the last checkpoint",
        (
            "test_distributed.py::test_shared_noise_is_the_run_of_one_process",
            "test_distributed.py::test_a_job_whose_rank_died_resumes_on_the_identical_trajectory",
        ),
    ),
    Row(
        "DDP, independent noise",
        '`IVON(sync="independent")` and `bayeslora.keep_gradients_local(ddp)`, or `(trainer)`',
        (
            "test_distributed_trainers.py::test_hf_trainer_with_independent_noise_keeps_the_ranks_identical",
            "test_distributed.py::test_independent_ranks_draw_their_own_samples_and_agree_on_the_mean",
            "test_distributed.py::test_the_hessian_variance_falls_as_one_over_ranks",
        ),
    ),
    Row(
        "FSDP2 (`fully_shard`)",
        "`patch`, then `fully_shard` (also on a 2-D mesh), then `IVON`; any number of shards, one trajectory",
        (
            "test_distributed.py::test_shards_follow_the_trajectory_of_the_whole",
            "test_distributed_trainers.py::test_a_patched_model_under_fsdp2_is_the_run_of_one_process",
        ),
    ),
    Row(
        "`torch.distributed.checkpoint`",
        "save on two ranks, load on two or one",
        ("test_distributed.py::test_a_checkpoint_of_two_shards_resumes_on_two_and_on_one",),
    ),
    Row(
        "`nn.DataParallel` (HF Trainer on several GPUs without a launcher)",
        "PEFT's own layers, with one log line; MonteCLoRA is refused",
        (
            "test_data_parallel.py::"
            "test_copies_give_the_models_loss_and_gradients_and_say_whose_forward_they_use",
            "test_data_parallel.py::test_copies_of_monteclora_refuse_to_train_and_predict_at_the_mean",
        ),
    ),
    Row(
        "DeepSpeed, FSDP1",
        "refused when the optimizer is built",
        ("test_distributed.py::test_deepspeed_and_fsdp1_are_refused_at_construction",),
    ),
    Row(
        "Llama, Qwen, Gemma, Mistral, GPT-2, RoBERTa, DeBERTa, T5, ViT",
        "`patch`",
        ("test_models.py::test_family_trains_as_with_peft_and_its_posterior_round_trips",),
    ),
    Row(
        "classification heads",
        'perturbed, or trained at the mean: `{"params": head, "perturb": False}`',
        ("test_models.py::test_a_head_that_is_not_perturbed_trains_at_its_mean",),
    ),
    Row(
        "several adapters",
        "one `IVON` each; train one while the others stand still",
        ("test_multi_adapter.py::test_one_trains_while_the_other_stands_still",),
    ),
    Row(
        "PEFT's MonteCLoRA",
        "`patch`; `MontecloraTrainerMixin`, or `configure_monteclora(model, add_loss=True)`",
        (
            "test_monteclora.py::test_checkpoints_are_pefts_both_ways",
            "test_monteclora.py::test_all_linear_layers_with_dropout_in_bf16_autocast",
        ),
    ),
)


def tests() -> list[str]:
    """Return every row's tests, each once."""
    return list(dict.fromkeys(test for row in ROWS for test in row.tests))


def main() -> None:
    paths = [str(ROOT / "tests" / test) for test in tests()]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", *paths],
        cwd=ROOT / "tests",  # not the root, whose kernels/ would lie on the path
        capture_output=True,
        text=True,
        check=False,
    )
    summary = done.stdout.strip().splitlines()[-1]
    if done.returncode != 0 or "skipped" in summary:
        sys.exit(f"{done.stdout[-3000:]}\nnot written: {summary}")
    packages = sorted({*ALWAYS, *(name for row in ROWS for name in row.packages)})
    content = {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "tests": tests(),
        "summary": summary.strip("= ").split(",")[0],
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    print(summary)


if __name__ == "__main__":
    main()
