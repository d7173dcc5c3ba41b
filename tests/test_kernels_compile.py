"""Every kernel compiles for the GPUs it is launched on and fits their shared memory; no GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
KERNELS = {
    "optimizer": {"ivon_sample_kernel", "ivon_fold_kernel", "ivon_check_kernel", "ivon_step_kernel"},
    "samplers": {"_log_gamma_kernel", "_perturb_kernel", "_coefficient_gradient_kernel", "_dropout_kernel"},
    "casts": {"_cast_kernel"},
    "perturbed": {
        "_perturbed_down_kernel",
        "_perturbed_up_kernel",
        "_perturbed_grads_kernel",
        "_sample_factors_kernel",
        "_sum_parts_kernel",
    },
    "layers": {
        "_lora_gemm_kernel",
        "_skinny_xa_kernel",
        "_skinny_xas_kernel",
        "_skinny_tall_kernel",
        "_tall_pair_kernel",
        "_sum_parts_kernel",
    },
}
CASES = [
    *((90, name) for name in KERNELS),
    (80, "casts"),
    (80, "perturbed"),  # A100
    (89, "perturbed"),  # RTX 40, with RTX 30's and 50's shared memory; "layers" is Hopper's alone
]


@pytest.mark.parametrize(("capability", "name"), CASES, ids=[f"sm{c}-{n}" for c, n in CASES])
def test_kernels_compile_and_fit(capability, name, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(TESTS / "compile_kernels.py"), str(capability), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stdout.split()) == KERNELS[name]


def test_no_kernel_is_left_out():
    source = "".join(file.read_text() for file in (TESTS.parent / "kernels").glob("*.py"))
    names = {line.split("(")[0][4:] for line in source.splitlines() if line.startswith("def ")}
    assert {name for name in names if name.endswith("_kernel")} == set().union(*KERNELS.values())
