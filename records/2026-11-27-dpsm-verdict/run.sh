# All runs of this record, in order: bash run.sh CHECKOUT FOLDER, with $LM_DATA. CHECKOUT has the patch of the third round.
set -eu
here=$(cd "$(dirname "$0")" && pwd); cd "$1"
mkdir -p "$2"; bash "$here/texts.sh" "$2"
go() { OMP_NUM_THREADS=1 .venv/bin/python -m eval.campaign "$here/$1.toml" --set data="$2" --set cache=runs/verdict/cache --jobs 2; }
for grid in judge:text-b one_pass:one-pass pretrain:one-pass finetune:speeches judge_c:text-c; do
  go "${grid%%:*}" "$2/${grid##*:}"
  if [ "${grid%%:*}" = pretrain ]; then
    mkdir -p runs/verdict/tokenizer runs/verdict/one-pass-test
    cp runs/verdict/cache/bpe2048-one-pass-*.json runs/verdict/tokenizer/tokenizer.json
    cp "$2/one-pass/test.txt" runs/verdict/one-pass-test/text.txt
  fi
done
