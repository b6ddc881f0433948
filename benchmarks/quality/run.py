"""Runs the benchmark: pairs × LoRA seeds × regimes × rows, each a small file, so that a broken run goes on where it was.

python -m benchmarks.quality.run [--rows NAME …] [--pairs 20] [--lora-seeds 2] [--seeds 32] [--regimes light strong]
                                 [--table main|ablations] [--workers N]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.quality import pairs, rows
from benchmarks.quality.ablations import ABLATIONS
from benchmarks.quality.measures import measured
from ziplora_lib.hosts.diffusers import DiffusersHost

CELLS = pairs.CACHE / "cells"
TABLES = {"main": rows.ROWS, "ablations": ABLATIONS}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=TABLES, default="main")
    parser.add_argument("--rows", nargs="+", help="of either table; all of the one if not given")
    parser.add_argument("--pairs", type=int, default=pairs.PAIRS)
    parser.add_argument("--validation", action="store_true", help="the validation pairs instead")
    parser.add_argument("--lora-seeds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--regimes", nargs="+", choices=pairs.REGIMES | pairs.TEXT, default=list(pairs.REGIMES))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker is None:
        given = sys.argv[1:] if arguments is None else list(arguments)
        command = [sys.executable, "-m", "benchmarks.quality.run", *given, "--worker"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        workers = [subprocess.Popen([*command, str(k)], env=environment) for k in range(args.workers)]
        ended = [worker.wait() for worker in workers]
        if any(ended):
            raise SystemExit("a worker failed; what is done is kept, and the next run goes on from there")
        return
    torch.set_num_threads(1)
    asked = args.rows or list(TABLES[args.table])
    table = {**rows.ROWS, **ABLATIONS}
    chosen = pairs.validation_pairs() if args.validation else pairs.pairs()[: args.pairs]
    todo = [(seed, regime, pair) for seed in range(args.lora_seeds) for pair in chosen for regime in args.regimes]
    host = DiffusersHost("miniature", device="cpu")
    # dealt by pair: two workers never train the same LoRA; with more some may be trained twice, to the same bytes
    for seed, regime, pair in todo:
        names = [name for name in asked if not done(name, table[name], regime, pair, seed, args.seeds)]
        if names and chosen.index(pair) % args.workers == args.worker:
            started = time.perf_counter()
            for strengths in sorted({table[name].strengths for name in names}):
                with rows.opened(host, pair, regime, seed, strengths) as on:
                    for name in names:
                        if table[name].strengths == strengths:
                            _cell(on, name, table[name], args.seeds)
            print(
                f"{regime} {seed} {pair.name}: {', '.join(names)} in {time.perf_counter() - started:.0f} s", flush=True
            )


def _cell(on: rows.Opened, name: str, row: rows.Row, seeds: int) -> None:
    with row.make(on, **row.fields) as shown:
        started = time.perf_counter()
        result = measured(on.host, on.pair, on.seed, shown.choose, seeds, shown.balances)
        facts = {**(shown.facts or {}), "error": on.errors()}
    cell = {
        "row": name,
        "spec": row.spec(),
        "regime": on.regime,
        "pair": [on.pair.subject, on.pair.style],
        "lora seed": on.seed,
        "training": pairs.training(on.regime),
        "measures": result,
        "facts": facts,
        "pictures s": time.perf_counter() - started,
    }
    file = path(name, on.regime, on.pair, on.seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(cell))
    part.replace(file)


def path(name: str, regime: str, pair: pairs.Pair, seed: int) -> Path:
    """Where a cell is kept."""
    return CELLS / f"{name}-{regime}-{pair.subject}-{pair.style}-{seed}.json"


def done(name: str, row: rows.Row, regime: str, pair: pairs.Pair, seed: int, seeds: int) -> bool:
    """Whether a cell is there, made by this very row, of LoRAs trained so, with as many pictures at least."""
    file = path(name, regime, pair, seed)
    if not file.exists():
        return False
    cell = json.loads(file.read_text())
    same = cell["spec"] == row.spec() and cell["training"] == list(pairs.training(regime))
    return same and len(cell["measures"]["joint free"]) >= seeds


if __name__ == "__main__":
    main()
