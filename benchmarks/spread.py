"""`python -m benchmarks.spread`: how much faster a calibration is with several actors of one thread than with one, in the same run.

Its organisms are built before (and kept in the user's cache folder); the cluster stands before the clock starts; starting actors counts.
"""

import argparse
import json
import platform
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from alignblind_mi import run_on_ray
from alignblind_mi.organism.family import build_family
from alignblind_mi.results import load_result, versions
from alignblind_mi.studies.calibration import CalibrationConfig, parts_of, run_calibration


def spread(config: CalibrationConfig, actors: int, rounds: int, folder: Path) -> dict[str, Any]:
    """A record: seconds with one actor and with `actors`, round by round, their ratio (of medians), and whether the rows are the same."""
    import ray

    run, times = partial(run_calibration, config), {n: list[float]() for n in (1, actors)}
    ray.init(num_cpus=actors, include_dashboard=False, log_to_driver=False)
    try:
        for number in range(rounds):
            for n in times if number % 2 == 0 else reversed(times):
                start = time.perf_counter()
                run_on_ray(run, folder / f"{number}-{n}", actors=n)
                times[n].append(time.perf_counter() - start)
    finally:
        ray.shutdown()
    names = [name for member in config.members for name in parts_of(member)]
    one, several = ([load_result(folder / f"0-{n}" / f"{name}.parquet").rows for name in names] for n in (1, actors))
    median = {n: pd.Series(found).median() for n, found in times.items()}
    return {"job": "calibration", "organisms": len(config.members), "actors": actors,
            "seconds": {str(n): found for n, found in times.items()},
            "ratio": median[1] / median[actors], "same": all(a.equals(b) for a, b in zip(one, several, strict=True))}


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spread", description=__doc__.splitlines()[0])
    parser.add_argument("--actors", type=int, default=2, help="actors of one thread each (default: 2)")
    parser.add_argument("--rounds", type=int, default=1, help="how often each is timed (default: 1)")
    parser.add_argument("--seeds", default="0", help="of the calibration that is run (quick; default: 0)")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    config = CalibrationConfig.create(args.seeds, quick=True)
    build_family(config.members, jobs=args.actors)
    with tempfile.TemporaryDirectory() as folder:
        found = spread(config, args.actors, args.rounds, Path(folder))
    print(f"{found['organisms']} organisms, {args.actors} actors against 1: {found['ratio']:.2f} times as fast; rows "
          f"{'equal' if found['same'] else 'DIFFERENT'}; seconds {found['seconds']}")
    if args.json:
        args.json.write_text(json.dumps(found | {"machine": platform.machine(), "versions": versions()}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
