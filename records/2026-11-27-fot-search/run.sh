# All runs of this record: bash records/2026-11-27-fot-search/run.sh, from the root of a checkout, with $LM_DATA.
# What has run is not run again.
set -eu
here=records/2026-11-27-fot-search
export OMP_NUM_THREADS=1
[ -e runs/tiny-qwen3 ] || .venv/bin/python -m recipes.tiny_qwen3 runs/tiny-qwen3
go() { grid=$1; shift; .venv/bin/python -m eval.campaign $here/"$grid" --jobs "${JOBS:-2}" "$@"; }
go search.toml
go linear.toml
go search.toml $(python3 $here/choose.py runs/fot_search/search lr fot_window beta2) --seeds 11,12,13 --out runs/fot_search/winner
go search.toml --set lr=4e-3 --set fot_window=32 --set beta2=0.999 --seeds 11,12,13 --out runs/fot_search/default
go linear.toml $(python3 $here/choose.py runs/fot_search/linear lr beta2) --seeds 11,12,13 --out runs/fot_search/best-linear
