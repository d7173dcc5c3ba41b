"""README is true: its tables come from the result files, and its first Python stands where it should."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_tables_come_from_the_result_files():
    command = [sys.executable, str(ROOT / "bench" / "readme_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_quickstart_is_short_and_early():
    lines = (ROOT / "README.md").read_text().splitlines()
    start = lines.index("```python")
    length = lines[start + 1 :].index("```")
    assert start + 1 <= 35
    assert length <= 20
    compile("\n".join(lines[start + 1 : start + 1 + length]), "README.md", "exec")
