"""The package as a stranger gets it: the wheel's layout, a lean import, and peace with HF's ``kernels``."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(sysconfig.get_paths()["purelib"])


def _run(*command, cwd, check=True):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # which a checkout may be on
    arguments = [str(c) for c in command]
    done = subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "bayeslora", "kernels"):
        _run("cp", "-R", ROOT / name, source / name, cwd=folder)  # keeps the symlink a symlink
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=[False, True], ids=["without_hf_kernels", "with_hf_kernels"])
def fresh_venv(request, wheel, tmp_path_factory):
    """A new environment with the wheel, and this one's packages beside it, HF's ``kernels`` or not."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder / "env", with_pip=False)
    others = folder / "others"
    others.mkdir()
    for entry in SITE.iterdir():
        name = entry.name.lower()
        if "bayeslora" in name or (name.startswith("kernels") and not request.param):
            continue
        (others / entry.name).symlink_to(entry)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "env" / "lib" / version / "site-packages"
    (site / "others.pth").write_text(f"{others}\n")
    with zipfile.ZipFile(wheel) as archive:  # a pure-Python wheel is installed by unpacking it
        archive.extractall(site)
    return folder / "env" / "bin" / "python", request.param


def test_wheel_holds_the_kernels_inside_the_package_and_nowhere_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(archive.read(n).decode() for n in names if n.endswith("/METADATA"))
        entry_points = next(archive.read(n).decode() for n in names if n.endswith("entry_points.txt"))
    assert len(names) == len(set(names))
    tops = {name.split("/")[0] for name in names}
    assert tops - {t for t in tops if t.endswith(".dist-info")} == {"bayeslora"}
    inside = {n.removeprefix("bayeslora/kernels/") for n in names if n.startswith("bayeslora/kernels/")}
    assert inside == {p.name for p in (ROOT / "kernels").glob("*.py")}
    assert "bayeslora/py.typed" in names
    assert "bayeslora = bayeslora.cli:main" in entry_points
    assert "License-Expression: Apache-2.0" in metadata


def test_import_is_lean(fresh_venv, tmp_path):
    python, _ = fresh_venv
    code = (
        "import sys, torch, bayeslora\n"
        "for name in ('peft', 'transformers', 'typer', 'torchmetrics', 'matplotlib'):\n"
        "    assert name not in sys.modules, name\n"
        "from bayeslora import IVON, Posterior\n"
        "assert 'peft' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert set(bayeslora.__all__) <= set(dir(bayeslora))\n"
    )
    _run(python, "-c", code, cwd=tmp_path)


def test_public_names_work(fresh_venv, tmp_path):
    python, _ = fresh_venv
    code = (
        "import bayeslora, pathlib\n"
        "assert 'site-packages' in bayeslora.__file__, bayeslora.__file__\n"
        "from importlib.util import find_spec\n"
        "public = set(bayeslora.__all__)\n"
        "if not find_spec('lightning'): public.remove('LightningCallback')\n"
        "for name in public: getattr(bayeslora, name)\n"
        "import bayeslora.kernels.noise_twin, bayeslora.kernels.ivon\n"
        "try: bayeslora.nonsense\n"
        "except AttributeError as error: assert 'nonsense' in str(error)\n"
        "else: raise SystemExit('no AttributeError')\n"
    )
    _run(python, "-c", code, cwd=tmp_path)


@pytest.mark.parametrize("cwd", ["elsewhere", "root"])
def test_transformers_sees_hugging_faces_kernels_or_none(fresh_venv, cwd, tmp_path):
    python, with_hf = fresh_venv
    if with_hf and not any(entry.name == "kernels" for entry in SITE.iterdir()):
        pytest.skip("Hugging Face's kernels package is not installed")
    code = (
        "import transformers, bayeslora.kernels.ivon_twin\n"
        "from transformers import LlamaForCausalLM\n"
        "try: import kernels\n"
        "except ModuleNotFoundError: kernels = None\n"
        "print(hasattr(kernels, 'get_kernel'))\n"
    )
    where = ROOT if cwd == "root" else tmp_path
    assert _run(python, "-c", code, cwd=where).stdout.split()[-1] == str(with_hf)


def test_no_file_makes_kernels_or_tests_a_package():
    for path in ("kernels/__init__.py", "tests/__init__.py", "conftest.py"):
        assert not (ROOT / path).exists(), f"{path} would let `kernels` shadow Hugging Face's package"
    assert (ROOT / "bayeslora" / "kernels").is_symlink()
