# FoT's runs of this record, and the forecasts of all runs that are in runs/: bash records/2026-11-28-forecast-early/run.sh,
# from the root of a checkout, with $LM_DATA. What has run is not run again.
set -eu
here=records/2026-11-28-forecast-early
export OMP_NUM_THREADS=1
text=runs/fot_sizes/text
[ -e $text ] || .venv/bin/python records/2026-11-28-fot-sizes/text.py "$LM_DATA/novels" $text
.venv/bin/python -m eval.campaign $here/fot.toml --set data=$text --jobs "${JOBS:-1}"
.venv/bin/python $here/collect.py runs "$LM_DATA/loss_curves" > runs/forecasts.csv  # forecasts.csv and later.csv together
.venv/bin/python $here/tables.py
