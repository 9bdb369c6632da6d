# All of this record: bash records/2026-11-28-ood-texts/run.sh, from the root of a checkout, with $LM_DATA, when the runs
# of ../2026-11-27-dpsm-arms (its seeds) and ../2026-11-27-dpsm-verdict (its fine-tuning) are in runs/.
set -eu
here=records/2026-11-28-ood-texts
export OMP_NUM_THREADS=1
owt=runs/ood_texts/openwebtext200
[ -e $owt ] || { mkdir -p $owt; head -n 200 "$LM_DATA/openwebtext-sample/openwebtext1000.jsonl" > $owt/all.jsonl; }
passes=$(ls -d runs/arms/seeds/*-seed1[4-8])
tuned=$(ls -d runs/verdict/finetune/ce-lr*-seed1[1-3] runs/verdict/finetune/ce-unigram0.4-*-seed1[1-3] \
  runs/verdict/finetune/smoothing-*-seed1[1-3])
for part in passes tuned; do
  [ -e $here/$part.csv ] && continue
  .venv/bin/python -m eval.ood ${!part} --on wikitext2 "$LM_DATA/lambada" $owt --device cpu \
    --cache runs/ood_texts/cache --csv runs/ood_texts/$part.csv
  sed "s#$LM_DATA/##" runs/ood_texts/$part.csv > $here/$part.csv
done
.venv/bin/python $here/tables.py
.venv/bin/python $here/bands.py $owt runs/arms/seeds/ce-seed14 runs/arms/seeds/ce-unigram0.4-unigram_gain3.0-seed14
