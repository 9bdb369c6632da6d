# All runs of this record: bash records/2026-11-28-bart-small/run.sh [pretrain|tune|judge], from the root of a checkout,
# with $LM_DATA. What has run is not run again. judge.toml has the learning rates that `tune` chose.
set -eu
here=records/2026-11-28-bart-small
export OMP_NUM_THREADS=1
campaign() { .venv/bin/python -m eval.campaign "$@" --jobs "${JOBS:-1}"; }
if [ "${1:-pretrain}" = pretrain ] && [ ! -e runs/bart-micro ]; then
  .venv/bin/python -m recipes.tiny_bart runs/bart-micro --data "$LM_DATA/novels" --data "$LM_DATA/openwebtext-sample" \
    --size bart-micro --vocab 4096 --seq-len 128 --steps 7000 --batch 32 --lr 1e-3 --device cpu
fi
if [ "${1:-tune}" = tune ]; then
  for lr in 5e-4 1.5e-3; do
    campaign $here/bart.toml --set seed=0 --set noise_references=0 --set lr=$lr --out runs/bart_small/tune/$lr
  done
fi
if [ "${1:-judge}" = judge ]; then
  campaign $here/judge.toml --out runs/bart_small/judge
fi
