"""``python -m benchmarks --rows implicit_warp,sampler_b1 --json FILE``: measure rows, print a table, write JSON."""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import inference, kernels, peers, training
from benchmarks.measure import Row, copy_bytes_per_second, device, operations_per_second

ROWS: dict[str, Callable[[], Row]] = {
    "implicit_warp": kernels.implicit_warp,
    "sampler_b1": partial(kernels.sampler, 1),
    "sampler_b8": partial(kernels.sampler, 8),
    "step_share_fine": partial(training.step_share, "step_share_fine", 0),
    "step_share_coarse": partial(training.step_share, "step_share_coarse", 4),
    "train_throughput": training.train_throughput,
    "locate_50": inference.locate_50,
    "vs_ants": partial(peers.row, "vs_ants"),
    "vs_elastix": partial(peers.row, "vs_elastix"),
}
PEERS = ("vs_ants", "vs_elastix")


def main() -> int:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rows", help=f"any of {', '.join(ROWS)}; all but the last two by default")
    parser.add_argument("--json", type=Path, help="write the rows here")
    asked = parser.parse_args()
    names = asked.rows.split(",") if asked.rows else [name for name in ROWS if name not in PEERS]
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"unknown row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    print(f"{device()}: copies {copy_bytes_per_second() / 1e9:.1f} GB/s, {operations_per_second() / 1e9:.0f} GFLOP/s")
    print(f"{'row':18} {'ours s':>10} {'reference s':>12} {'ratio':>8} {'memory':>8} {'bound':>7}")
    rows = []
    for name in names:
        try:
            row = ROWS[name]()
        except peers.Unavailable as missing:
            print(f"{name:18} {missing}")
            continue
        rows.append(row)
        numbers = (row.ours_s, row.reference_s, row.ratio, row.memory_ratio, row.bound_fraction)
        cells = ["" if n is None else f"{n:.4g}" for n in numbers]
        print(
            f"{name:18} {cells[0]:>10} {cells[1]:>12} {cells[2]:>8} {cells[3]:>8} {cells[4]:>7}  {row.note}", flush=True
        )
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n", encoding="utf-8")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
