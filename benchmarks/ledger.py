"""A million documents into a ledger: rows a second and peak memory, in a process that does nothing else."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from common import peak_memory

from byheart.formats import import_files
from byheart.ledger import Ledger

COUNT = 1_000_000


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else COUNT
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.jsonl"
        with path.open("w") as stream:
            for n in range(count):
                row = {"type": "document", "id": f"d{n}", "title": f"Page {n}", "text": f"{n} is told of here. " * 20}
                stream.write(json.dumps(row) + "\n")
        began = time.perf_counter()
        with Ledger(Path(folder) / "ledger.db", create=True) as ledger:
            import_files(ledger, [path])
            taken = time.perf_counter() - began
            assert ledger.count("document") == count
    print(f"ledger: {count:,} documents in {taken:.0f} s, {count / taken:,.0f} a second; {peak_memory()}")


if __name__ == "__main__":
    main()
