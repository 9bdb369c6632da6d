# All runs of this record: bash records/2026-11-28-fot-sizes/run.sh [mini|smollm2], from the root of a checkout, with
# $LM_DATA. What has run is not run again. MORE, such as "--dry-run commands", goes to every campaign.
set -eu
here=records/2026-11-28-fot-sizes
export OMP_NUM_THREADS=1
campaign() { .venv/bin/python -m eval.campaign "$@" --jobs "${JOBS:-1}" ${MORE:-}; }
if [ "${1:-mini}" = mini ]; then
  [ -e runs/fot_sizes/text ] || .venv/bin/python $here/text.py "$LM_DATA/novels" runs/fot_sizes/text
  for seed in 51 52 53; do
    for steps in 150 300 600; do
      campaign $here/mini.toml --set data=runs/fot_sizes/text --set steps=$steps --seeds $seed --out runs/fot_sizes/mini/$steps
    done
  done
fi
if [ "${1:-smollm2}" = smollm2 ]; then
  [ -e runs/smollm2 ] || .venv/bin/python -m recipes.smollm2 runs/smollm2
  data=runs/fot_sizes/gsm8k
  if [ ! -e $data ]; then
    mkdir -p $data
    head -n 112 "$LM_DATA/gsm8k/train.jsonl" > $data/train.jsonl
    head -n 64 "$LM_DATA/gsm8k/test.jsonl" > $data/test.jsonl
  fi
  for steps in 32 64 128; do
    campaign $here/smollm2.toml --set data=$data --set steps=$steps --out runs/fot_sizes/smollm2/$steps
  done
fi
