"""How far a forecast of the smooth loss must be off, as what it is measured by, a run's last points, has noise.

python records/2026-11-26-forecast-intervals/floor.py CURVES
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402

from schedules.backtest import read_all, stop_at  # noqa: E402

DRAWS = 20_000

rng, families = np.random.default_rng(0), {}
for curve in read_all(sys.argv[1:]):
    stop, late = stop_at(curve, 0.75), curve.loss[curve.step >= 0.75 * curve.step[-1]]
    if not stop.final > 0 or len(late) < 8:
        continue
    # Second differences of a smooth curve are noise alone, with 6 times its variance where it is white.
    noise = float(np.std(np.diff(late, 2))) / math.sqrt(6) / math.sqrt(stop.width) / stop.final
    width = max(int(stop.width), 1)
    before = float(np.mean(curve.loss[-7 * width : -width])) / stop.final - 1
    families.setdefault(curve.family, []).append((100 * noise, 100 * abs(before)))
print("family, curves; sd of the final in %: median; median |error| of a forecast that knows the smooth loss (90 % of")
print("draws); median |error| of the mean of the points right before the final, six times as many, in hindsight")
for family, found in sorted(families.items()):
    sd, before = np.array(found).T
    medians = np.median(np.abs(rng.normal(size=(DRAWS, len(sd))) * sd), axis=1)
    low, mid, high = np.quantile(medians, [0.05, 0.5, 0.95])
    print(f"{family:16} {len(sd):3}  {np.median(sd):.2f}  {mid:.2f} ({low:.2f} to {high:.2f})  {np.median(before):.2f}")
