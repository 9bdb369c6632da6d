# All runs of this record: bash records/2026-11-27-dpsm-arms/run.sh FOLDER, from the root of a checkout, where
# ../2026-11-27-dpsm-verdict/texts.sh has put its texts into FOLDER. What has run is not run again.
set -eu
here=records/2026-11-27-dpsm-arms texts=$1
go() {
  grid=$1; shift
  OMP_NUM_THREADS=1 .venv/bin/python -m eval.campaign "$grid" --set cache=runs/arms/cache --jobs "${JOBS:-2}" "$@"
}
go $here/tune.toml --set data="$texts/text-a"
python3 $here/choose.py runs/arms/tune $here/tune.toml $here/judge.toml
go $here/judge.toml --set data="$texts/text-c"
go $here/seeds.toml --set data="$texts/text-c"
go $here/noise.toml --set data="$texts/text-c"

# A quarter and a sixteenth of the training part; validation, test and tokenizer are those of the whole text.
for text in a c; do
  mkdir -p runs/arms/tokenizer-$text
  cp runs/arms/cache/bpe2048-text-$text-*.json runs/arms/tokenizer-$text/tokenizer.json
  for part in quarter:40000 sixteenth:10000; do
    out=$texts/${part%%:*}-$text; mkdir -p "$out"
    cp "$texts/text-$text/val.txt" "$texts/text-$text/test.txt" "$out"
    head -c "${part##*:}" "$texts/text-$text/train.txt" > "$out/train.txt"
  done
done
for part in quarter sixteenth; do
  go $here/low_fair.toml --set data="$texts/$part-a" --set tokenizer=runs/arms/tokenizer-a --out runs/arms/low_fair/$part
  dropout=$(python3 $here/choose.py runs/arms/low_fair/$part)
  go $here/low.toml --set data="$texts/$part-c" --set tokenizer=runs/arms/tokenizer-c --set dropout="$dropout" \
    --out runs/arms/low/$part
done

# Shao's order: CE for 72 % of the steps, then Brier with a smoothed tail from its last weights, the second rate chosen
# on text A.
shao() {
  data=$1 seed=$2 lr=$3 out=runs/arms/shao/$4; flags="--tokenizer bpe:2048 --model pico --seq-len 128 --batch 8"
  flags="$flags --lr-warmup 0.05 --dropout 0.1 --log-every 10 --sample-tokens 5 --device cpu --cache runs/arms/cache"
  export OMP_NUM_THREADS=1
  [ -e "$out-ce/summary.json" ] || .venv/bin/python train_lm.py $flags --data "$data" --loss ce --lr 3e-3 --steps 720 \
    --eval-every 60 --seed "$seed" --out "$out-ce" --report last
  [ -e "$out-brier$lr/summary.json" ] || .venv/bin/python train_lm.py $flags --data "$data" --loss brier \
    --tail-smoothing 0.1 --lr "$lr" --steps 280 --eval-every 40 --seed "$seed" --init-from "$out-ce" \
    --out "$out-brier$lr" --report best --ood runs/verdict/ood
}
for lr in 3e-4 1e-3 3e-3; do shao "$texts/text-a" 1 $lr a-seed1; done
best=$(python3 $here/choose.py runs/arms/shao)
for seed in 11 12 13; do shao "$texts/text-c" $seed "$best" c-seed$seed; done
