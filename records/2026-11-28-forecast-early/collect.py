"""What the forecaster says of recorded runs at four stops, before and after: a CSV on standard output.

python records/2026-11-28-forecast-early/collect.py runs $LM_DATA/loss_curves > forecasts.csv
"""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from schedules.backtest import feed, read_all, stop_at  # noqa: E402
from schedules.forecast import Forecaster, Prior  # noqa: E402
from schedules.learn import FRACTIONS  # noqa: E402
from schedules.logs import Curve, read_curves  # noqa: E402

WHOLE = "fot_parts/pico fot_samples_judge fot_sizes/mini fot_sizes/smollm2".split()  # a family each
PARTED = "arms fot_budgets verdict fot_parts/lora fot_samples_lora fot_search smollm2-epochs".split()  # one a part
PUBLIC = "modded_nanogpt multipowerlaw olmo_ladder finetuning".split()
PLANS = Path(__file__).parent.parent / "2026-11-21-forecast-backtest/plans.json"
BEFORE = Prior(early=0.0, early_sd=0.0)


def curves(runs: Path, public: Path) -> Iterator[tuple[str, str, Curve]]:
    """(family, run, curve) of finished runs."""
    for root in [*WHOLE, *PARTED]:
        for file in sorted((runs / root).rglob("metrics.jsonl")):
            if not (file.parent / "summary.json").exists():
                continue
            config = json.loads((file.parent / "config.json").read_text())
            size = Path(config["model"]).name
            (curve,) = read_curves(file)
            parts = file.relative_to(runs).parts
            family = f"{root if root in WHOLE else '/'.join(parts[:2])}, {size}, {config['steps']} steps"
            yield family, "/".join(parts[1:-1]), curve
    plans = json.loads(PLANS.read_text())
    for name in PUBLIC:
        for curve in read_all([str(public / name)], plans=plans):
            yield f"public, {name}", curve.name, curve


def main() -> int:
    runs, public = map(Path, sys.argv[1:])
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow("family run stop first final mean_before sd_before mean sd".split())
    for family, run, curve in curves(runs, public):
        for fraction in FRACTIONS:
            stop, found = stop_at(curve, fraction), []
            if not stop.seen:
                continue
            plan = None if curve.lr is None else stop.plan
            for known in (None, curve.finetune):
                forecaster = feed(Forecaster(epoch=curve.epoch, finetune=known), curve, stop.seen)
                told = forecaster.forecast(stop.end, plan, window=stop.width)
                if not found and "taken for fine-tuning" not in told.notes:
                    forecaster.prior = BEFORE
                    told = forecaster.forecast(stop.end, plan, window=stop.width)
                found += ["", ""] if told.mean is None else [f"{told.mean:.5g}", f"{told.sd:.3g}"]
            out.writerow([family, run, fraction, f"{forecaster.began or 0:.4g}", f"{stop.final:.5g}", *found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
