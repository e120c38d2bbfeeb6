"""Methods on another device than the CPU: nothing may stay behind there."""

import subprocess
import sys

import pytest

from conftest import ROOT


@pytest.mark.real
def test_methods_learn_answer_and_are_kept_on_another_device(tmp_path):
    program = ROOT / "tests" / "elsewhere.py"
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        f"{name} works elsewhere" for name in ("edit", "ft", "rome", "memory", "prefix", "prefix")
    ]
