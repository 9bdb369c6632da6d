# All runs of this record: bash records/2026-11-28-fot-parts/run.sh, from the root of a checkout, with $LM_DATA. What has
# run is not run again.
set -eu
here=records/2026-11-28-fot-parts
export OMP_NUM_THREADS=1
text=runs/fot_sizes/text
[ -e $text ] || .venv/bin/python records/2026-11-28-fot-sizes/text.py "$LM_DATA/novels" $text
.venv/bin/python -m eval.campaign recipes/fot_small_parts.toml --set data=$text --seeds 71,72,73 --out runs/fot_parts/pico \
  --jobs "${JOBS:-1}"
[ -e runs/tiny-qwen3 ] || .venv/bin/python -m recipes.tiny_qwen3 runs/tiny-qwen3
.venv/bin/python -m eval.campaign $here/lora.toml --jobs "${JOBS:-1}"
