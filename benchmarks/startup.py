"""What `byheart --help` costs, beside a bare Python and beside importing torch."""

from __future__ import annotations

import subprocess
import sys

from common import race


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def main() -> None:
    show = "import sys; sys.argv = ['byheart', '--help']; from byheart.cli import main; main()"
    seconds = race(
        7, bare_python=lambda: run("pass"), byheart_help=lambda: run(show), import_torch=lambda: run("import torch")
    )
    print("startup:", ", ".join(f"{name} {taken:.2f} s" for name, taken in seconds.items()))


if __name__ == "__main__":
    main()
