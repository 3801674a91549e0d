"""`python -m benchmarks`: ratios of our time against rivals' in the same run. See `--help`."""

import argparse
import json
import platform
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from alignblind_mi.results import versions
from benchmarks.jobs import JOBS, Bench
from benchmarks.models import SIZES, make_checkpoint, quiet_single_thread
from benchmarks.parts import parts
from benchmarks.rivals import REQUIRES, environment, worker
from benchmarks.scaling import scaling
from benchmarks.timing import run


def main() -> None:
    """Run the jobs that are asked for, print a table and write records."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios on random-weight models, one CPU thread.")
    parser.add_argument("--size", default="S", help="S, D or M, or several with commas (default: S)")
    parser.add_argument("--jobs", default=",".join(JOBS), help=f"comma-separated: {', '.join(JOBS)}")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after one for warming up (default: 3)")
    parser.add_argument("--rivals", default="", help=f"other libraries, installed into environments of their own: {', '.join(REQUIRES)}")
    parser.add_argument("--rival-envs", type=Path, default=Path("build/rivals"), help="their folder (default: build/rivals)")
    parser.add_argument("--parts", action="store_true", help="instead: how much longer each job takes without each part of the engine")
    parser.add_argument("--scaling", action="store_true", help="instead: how cost grows with rows, layers and prompt length")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--models", type=Path, help="where the random checkpoints are kept (default: a temporary folder)")
    args = parser.parse_args()
    sizes, jobs = args.size.split(","), args.jobs.split(",")
    for given, known in ((sizes, SIZES), (jobs, JOBS), ([name for name in args.rivals.split(",") if name], REQUIRES)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"unknown {unknown[0]!r}: choose from {', '.join(known)}")
    quiet_single_thread()
    found = {name: environment(name, args.rival_envs, _say) for name in args.rivals.split(",") if name}
    rivals = {name: python for name, python in found.items() if python is not None}
    with tempfile.TemporaryDirectory() as folder:
        models = args.models or Path(folder)
        if args.scaling:
            records = [_show_point(point) for point in scaling(models, args.rounds)]
        elif args.parts:
            records = [record for size in sizes for record in _parts(size, jobs, args.rounds, models)]
        else:
            records = [record for size in sizes for record in _size(size, jobs, args.rounds, models, rivals)]
    if args.json:
        note = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "versions": versions()}
        args.json.write_text(json.dumps({"records": records, **note}, indent=1), "utf-8")


def _size(name: str, jobs: list[str], rounds: int, folder: Path, rivals: dict[str, Path]) -> list[dict[str, Any]]:
    size = SIZES[name]
    bench = Bench(size, make_checkpoint(size, folder / name))
    records = []
    with ExitStack() as stack:
        for rival, python in rivals.items():
            bench.libraries[rival] = lambda job, tensors, rival=rival, python=python: stack.enter_context(    # type: ignore[misc]
                worker(rival, python, bench.folder, job, tensors, folder, _say))
        for job in jobs:
            made = run(JOBS[job](bench), rounds, _say)
            for record in made:
                _show(record)
            records += made
    return records


def _parts(name: str, jobs: list[str], rounds: int, folder: Path) -> list[dict[str, Any]]:
    size = SIZES[name]
    bench = Bench(size, make_checkpoint(size, folder / name))
    records = []
    for job in jobs:
        for record in parts(bench, JOBS[job](bench), rounds):
            print(f"{job:<11}{name:<3}{record['times_longer']:>6.2f} times as long without {record['without']}", flush=True)
            records.append(record)
    return records


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show_point(point: dict[str, Any]) -> dict[str, Any]:
    bend = "  <- dearer by more than a fifth" if point["bends"] else ""
    print(f"{point['axis']:<8}{point['value']:>6}{point['seconds']:>10.3f} s   unit cost {point['unit_cost']:.2f}{bend}", flush=True)
    return point


def _show(record: dict[str, Any]) -> None:
    floor = "" if record["floor_share"] is None else f"  {100 * record['floor_share']:.0f} % of the floor"
    memory = f"  memory {record['memory_share']:.3f} of its" if "memory_share" in record else ""
    exact = "same output" if record["exact"] else "OUTPUT DIFFERS"
    print(f"{record['job']:<11}{record['size']:<3}{record['ratio']:>8.2f}x  [{record['ratio_low']:.2f}, {record['ratio_high']:.2f}]  "
          f"{record['rival']:<52}{exact}{floor}{memory}", flush=True)


if __name__ == "__main__":
    main()
