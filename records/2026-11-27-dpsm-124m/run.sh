# bash run.sh TEXTS RUNS SIDE_BY_SIDE [FLAGS...]: the runs of this record that are not done, in this order. A run that was
# stopped goes on. TEXTS is what texts.sh made; FLAGS are added to each (a trial on a CPU: --model pico --steps 4 ...).
set -u
texts=$1 runs=$2 side=$3
shift 3
usual="--model gpt2 --tokenizer gpt2 --seq-len 1024 --batch 16 --micro-batch 16 --steps 1000 --lr 6e-4 --lr-warmup 0.05
  --eval-every 100 --log-every 20 --sample-tokens 1 --report best --ood $texts/ood"
few="$usual --data $texts/few --dropout 0.2"
once="$usual --data $texts/once --dropout 0.0"
driven="--loss ce --unigram 0.4 --unigram-gain 3"
while read -r name flags; do
  [ -e "$runs/$name/summary.json" ] && continue
  resume=$([ -e "$runs/$name/last.pt" ] && echo --resume)
  echo "--out $runs/$name $flags $* $resume"
done <<EOF | xargs -P "$side" -I{} sh -c "python3 train_lm.py {} >> $runs.log 2>&1"
few-ce-s1 $(echo $few) --seed 1 --loss ce
few-driven-s1 $(echo $few) --seed 1 $driven
few-dpsm-s1 $(echo $few) --seed 1 --loss dpsm --warmup 0.1
once-ce-s1 $(echo $once) --seed 1 --loss ce
once-driven-s1 $(echo $once) --seed 1 $driven
few-smoothing-s1 $(echo $few) --seed 1 --loss smoothing --eps 0.1
few-brier-s1 $(echo $few) --seed 1 --loss brier
once-dpsm-s1 $(echo $once) --seed 1 --loss dpsm --warmup 0.1
few-ce-s2 $(echo $few) --seed 2 --loss ce
few-driven-s2 $(echo $few) --seed 2 $driven
once-brier-s1 $(echo $once) --seed 1 --loss brier
EOF
