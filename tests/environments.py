"""The environments that bayeslora is tested in, each made by one command, with Python's standard library.

    python tests/environments.py exact FOLDER      what constraints.txt names: README's commands install it
    python tests/environments.py minimum FOLDER    the lower bounds that pyproject.toml declares
    python tests/environments.py newest FOLDER     what the package index has today

FOLDER becomes a virtual environment of the Python that runs this, with this tree in it as an editable
install; `FOLDER/bin/pytest -n auto --dist loadfile` runs the tests. Packages come from where pip's settings
say: `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu` brings torch without CUDA's libraries. Then:

    python tests/environments.py freeze FOLDER     write constraints.txt: the versions in that environment
    python tests/environments.py triton FOLDER     test launches in the minimum with every newer Triton, too
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"


def lower_bounds() -> dict[str, str]:
    """Return the least version of everything that the package and its tests require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(r for name in extras if name != "dev" for r in extras[name])]
    found = (re.match(r"([\w-]+)[>=]=([\w.]+)", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in found if match}


def pins() -> dict[str, str]:
    """Return the exact versions of constraints.txt."""
    lines = CONSTRAINTS.read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def pip(folder: Path, *words: str) -> str:
    """Run pip in the environment; return what it printed."""
    command = [folder / "bin" / "python", "-m", "pip", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def make(kind: str, folder: Path) -> None:
    """Make one of the three environments."""
    venv.create(folder, with_pip=True)
    if kind == "newest":  # chosen together with the rest, an older torch may be taken for another's sake
        pip(folder, "install", "--quiet", "torch")
    versions = {
        "exact": ["-c", str(CONSTRAINTS)],
        "minimum": [f"{name}=={version}" for name, version in lower_bounds().items()],
        "newest": [],
    }[kind]
    extra = "dev" if kind == "exact" else "test"
    pip(folder, "install", "--quiet", *versions, "-e", f"{ROOT}[{extra}]")


def freeze(folder: Path) -> None:
    """Write constraints.txt from an environment."""
    listed = pip(folder, "list", "--format=freeze", "--exclude=pip", "--exclude=bayeslora")
    lines = [line.partition("+")[0] for line in listed.splitlines()]  # without "+cpu", which no index names
    head = "# Written by `python tests/environments.py freeze`: the versions that the tests passed with.\n"
    CONSTRAINTS.write_text(head + "\n".join(lines) + "\n")


def with_every_triton(folder: Path) -> None:
    """Run the tests of what depends on Triton's insides with every release, each from an empty cache."""
    listed = pip(folder, "index", "versions", "triton")
    releases = re.search(r"Available versions: (.*)", listed)[1].split(", ")
    least = _numbers(lower_bounds()["triton"])
    for release in sorted((r for r in releases if _numbers(r) >= least), key=_numbers):
        with tempfile.TemporaryDirectory() as target, tempfile.TemporaryDirectory() as cache:
            pip(folder, "install", "--quiet", "--no-deps", f"--target={target}", f"triton=={release}")
            sys.stdout.write(f"Triton {release}\n")
            sys.stdout.flush()
            paths = {"PYTHONPATH": f"{target}{os.pathsep}{ROOT}", "TRITON_CACHE_DIR": cache}
            files = [ROOT / "tests" / name for name in ("test_launch.py", "test_kernels_compile.py")]
            command = [folder / "bin" / "pytest", "-q", "-n", "0", *files]
            subprocess.run(command, check=True, cwd=ROOT, env=os.environ | paths)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["exact" | "minimum" | "newest" as kind, folder]:
            make(kind, Path(folder))
        case ["freeze", folder]:
            freeze(Path(folder))
        case ["triton", folder]:
            with_every_triton(Path(folder))
        case _:
            sys.exit(__doc__)
