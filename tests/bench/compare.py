"""Compares the ratios of two runs of the benches: `python tests/bench/compare.py bench.json baseline.json`.

The exit status is 1 if a ratio is more than 20 % above its baseline. `make bench-check` runs it after `make bench`. To
make the last run the baseline, copy bench.json to tests/bench/baseline.json.
"""

import json
import sys
from pathlib import Path

ALLOWED = 1.2  # a ratio may be larger than its baseline by this factor: less is within the noise of a shared machine


def verdict(before, now):
    """What became of a ratio; None is one that was not measured."""
    if before is None:
        return "new"
    if now is None:
        return "not measured"
    return "WORSE" if now > ALLOWED * before else f"{now / before - 1:+.0%}"


def table(baseline, ratios):
    """Rows of name, ratio before, ratio now and verdict, for every name of either run."""
    names = sorted(baseline | ratios)
    return [
        (name, baseline.get(name), ratios.get(name), verdict(baseline.get(name), ratios.get(name))) for name in names
    ]


def main(measured, baseline):
    """Prints the comparison of two files; returns the exit status."""
    missing = [str(file) for file in (measured, baseline) if not Path(file).is_file()]
    if missing:
        print(f"Expected a file of ratios, {' and '.join(missing)} is not there; `make bench` writes bench.json.")
        return 2
    new, old = (json.loads(Path(file).read_text(encoding="utf-8")) for file in (measured, baseline))
    for title, run in (("baseline", old), ("now", new)):
        place = run["environment"]
        print(f"{title:<9}{run['commit']}, {place['processor']}, {place['threads']} threads, load {place['load']}")
    rows = table(old["ratios"], new["ratios"])
    width = max(len(name) for name, *_ in rows)
    for name, before, now, said in rows:
        cells = ("-" if value is None else f"{value:.3f}" for value in (before, now))
        print(f"{name:<{width}}  " + "  ".join(f"{cell:>7}" for cell in cells) + f"  {said}")
    worse = sum(said == "WORSE" for *_, said in rows)
    print(f"{worse} of {len(new['ratios'])} ratios are more than {ALLOWED - 1:.0%} worse than the baseline.")
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
