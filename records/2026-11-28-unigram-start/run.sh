# All runs of this record: bash records/2026-11-28-unigram-start/run.sh, from the root of a checkout of
# 3170637, which has the flag, when the texts and tokenizers of ../2026-11-27-dpsm-arms and ../2026-11-27-dpsm-verdict
# are in runs/. What has run is not run again.
set -eu
here=records/2026-11-28-unigram-start
export OMP_NUM_THREADS=1
go() { .venv/bin/python -m eval.campaign $here/start.toml --out runs/unigram_start/"$@" --jobs "${JOBS:-1}"; }
for part in sixteenth quarter; do
  go $part --set data=runs/verdict/$part-c --set tokenizer=runs/arms/tokenizer-c --set dropout=0.1 --set cache=runs/arms/cache
done
go whole --set data=runs/verdict/text-c --set tokenizer=bpe:2048 --set dropout=0.1 --set cache=runs/arms/cache --seeds 14,15,16,17,18
go one-pass --set data=runs/verdict/one-pass --set tokenizer=bpe:2048 --set dropout=0.0 --set cache=runs/verdict/cache
