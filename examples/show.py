"""Print a few rows of a finished job: python examples/show.py OUTPUT_FOLDER [ROWS]"""

from __future__ import annotations

import sys

import pyarrow.dataset as ds

folder, rows = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
table = ds.dataset(folder, format="parquet").to_table(columns=["prompt", "generated_text", "finish_reason", "status"])
for row in table.slice(0, rows).to_pylist():
    print("-" * 100)
    print("prompt:   ", row["prompt"][:200].replace("\n", " "))
    print("generated:", row["generated_text"])
    print(f"({row['status']}, finished by {row['finish_reason']})")
print("-" * 100)
print(f"{table.num_rows} rows in {folder}/part-*.parquet")
