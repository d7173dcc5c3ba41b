"""PEFT's own tests, as they are and with every LoRA model patched: where the two differ, it is ours.

    python tests/peft_suite.py PATH_TO_PEFT_CHECKOUT [pytest arguments]

Runs pytest twice in a checkout of PEFT, against the peft that is installed; take the checkout of its version.
In the second run every injection of LoRA layers (``get_peft_model``, ``add_adapter``, ``from_pretrained``,
``load_adapter``, ``inject_adapter_in_model``, transformers' own) ends with `bayeslora.patch`. Writes the
counts of both runs and the tests whose outcomes differ, and exits with 1 where one passes only unpatched. The
arguments (``tests/test_custom_models.py -k lora -n 4``) go to both runs; without any, all tests run. Many
load models from the hub: what fails for want of them fails in both.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

_RECORD, _PATCHED = "BAYESLORA_PEFT_RECORD", "BAYESLORA_PEFT_PATCHED"
_WORST_LAST = ("passed", "skipped", "failed", "error")


def pytest_configure() -> None:
    """Patch every model from here on, in the run that asks for it; this module is a plugin of pytest too."""
    if os.environ.get(_PATCHED):
        from peft.tuners.lora.layer import LoraLayer
        from peft.tuners.tuners_utils import BaseTuner

        import bayeslora

        inject = BaseTuner.inject_adapter

        def inject_and_patch(self, model, *arguments, **keywords):
            inject(self, model, *arguments, **keywords)
            if any(isinstance(module, LoraLayer) for module in model.modules()):
                bayeslora.patch(self)
                fused = sum(type(module).__module__.startswith("bayeslora") for module in model.modules())
                _write("", fused)

        BaseTuner.inject_adapter = inject_and_patch


def pytest_runtest_logreport(report) -> None:
    """Write one line a phase of a test; xdist's workers send theirs here."""
    if _RECORD in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        outcome = "error" if report.failed and report.when != "call" else report.outcome
        _write(report.nodeid, outcome)


def _write(name, value) -> None:
    with open(os.environ[_RECORD], "a") as record:
        record.write(json.dumps([name, value]) + "\n")


def run(checkout: Path, arguments: list[str], patched: bool) -> tuple[dict[str, str], int]:
    """Run the checkout's tests; return each one's outcome, the worst of its phases, and the fused layers."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "outcomes"
        record.touch()
        paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), _RECORD: str(record)}
        if patched:
            environment[_PATCHED] = "1"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "peft_suite",
            "-o",
            "addopts=",
            "-q",
            *(arguments or ["tests"]),
        ]
        subprocess.run(command, cwd=checkout, env=environment, check=False)
        outcomes: dict[str, str] = {}
        fused = 0
        for line in record.read_text().splitlines():
            name, value = json.loads(line)
            if name:
                outcomes[name] = max(outcomes.get(name, "passed"), value, key=_WORST_LAST.index)
            else:
                fused += value
        return outcomes, fused


def main() -> int:
    """Compare both runs."""
    if len(sys.argv) < 2 or not Path(sys.argv[1], "tests").is_dir():
        raise SystemExit("usage: python tests/peft_suite.py PATH_TO_PEFT_CHECKOUT [pytest arguments]")
    checkout, arguments = Path(sys.argv[1]), sys.argv[2:]
    (plain, _), (patched, fused) = (run(checkout, arguments, patched=patched) for patched in (False, True))
    lines = [f"{fused} fused layers"]
    for title, outcomes in (("unpatched", plain), ("patched", patched)):
        counts = Counter(outcomes.values())
        lines.append(f"{title}: " + ", ".join(f"{counts[kind]} {kind}" for kind in _WORST_LAST))
    names = sorted({*plain, *patched})
    differ = [name for name in names if plain.get(name) != patched.get(name)]
    lines.append(f"{len(differ)} of {len(names)} differ")
    lines += [f"  {plain.get(name, 'not run')} -> {patched.get(name, 'not run')}  {name}" for name in differ]
    sys.stdout.write("\n".join(lines) + "\n")
    return int(not fused or any(plain.get(name) == "passed" for name in differ))


if __name__ == "__main__":
    raise SystemExit(main())
