# All runs of this record: bash records/2026-11-28-fot-window/run.sh [pico|mini], from the root of a checkout, with
# $LM_DATA. What has run is not run again.
set -eu
here=records/2026-11-28-fot-window
export OMP_NUM_THREADS=1
text=runs/fot_sizes/text
[ -e $text ] || .venv/bin/python records/2026-11-28-fot-sizes/text.py "$LM_DATA/novels" $text
.venv/bin/python -m eval.campaign $here/"${1:-pico}".toml --set data=$text --jobs "${JOBS:-1}"
