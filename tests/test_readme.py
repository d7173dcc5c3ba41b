"""README is true: its tables come from the result files, and its first Python stands where it should."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import environments
import pytest

ROOT = Path(__file__).resolve().parents[1]


def _measured_since_the_commit():
    git = ["git", "-C", str(ROOT), "status", "--porcelain", "bench/results"]
    return shutil.which("git") and subprocess.run(git, capture_output=True, check=False).stdout


@pytest.mark.skipif(
    bool(_measured_since_the_commit()),
    reason="bench/results changed since the commit: python bench/readme_tables.py brings README up to date",
)
def test_tables_come_from_the_result_files():
    command = [sys.executable, str(ROOT / "bench" / "readme_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_test_of_the_compatibility_table_exists():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import compatibility
    finally:
        sys.path.remove(str(ROOT / "bench"))
    for test in compatibility.tests():
        file, name = test.split("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
    recorded = json.loads(compatibility.RESULT.read_text())
    assert recorded["tests"] == compatibility.tests(), "run python bench/compatibility.py"


def test_commands_name_versions_that_were_tested():
    readme, pins = (ROOT / "README.md").read_text(), environments.pins()
    assert readme.count("pip install -c constraints.txt") == 2
    assert f"pip install torch=={pins['torch']} --index-url" in readme
    assert set(environments.lower_bounds()) <= set(pins)


def test_quickstart_is_short_and_early():
    lines = (ROOT / "README.md").read_text().splitlines()
    start = lines.index("```python")
    length = lines[start + 1 :].index("```")
    assert start + 1 <= 35
    assert length <= 20
    compile("\n".join(lines[start + 1 : start + 1 + length]), "README.md", "exec")
