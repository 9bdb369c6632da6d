# All runs of this record: bash records/2026-11-28-fot-samples/run.sh, from the root of a checkout, with $LM_DATA. The
# tries run in trees of the commit that registered the last of them, under runs/fot_samples_tries, each with its patch.
# What has run is not run again. MORE, such as "--dry-run commands", goes to every campaign.
set -eu
here=records/2026-11-28-fot-samples root=$PWD registered=72c15e0
export OMP_NUM_THREADS=1
texts=$root/runs/fot_samples_text
[ -e "$texts" ] || .venv/bin/python $here/text.py "$LM_DATA/novels" "$texts"
[ -e runs/tiny-qwen3 ] || .venv/bin/python -m recipes.tiny_qwen3 runs/tiny-qwen3
trees=runs/fot_samples_tries; mkdir -p $trees
tree() { # NAME [PATCH]: as registered, with a patch of this record or without
  [ -e "$trees/$1" ] && return
  git worktree add --detach "$trees/$1" $registered
  ln -s "$root/.venv" "$root/runs" "$trees/$1"
  if [ $# -gt 1 ]; then git -C "$trees/$1" apply "$root/$here/$2.patch"; fi
}
tree before; tree weights weights; tree aim aim; tree over schedule_free; tree lowest lowest
go() { # TREE RECIPE TEXT STEPS OUT FLAG=VALUE ...
  tree=$1 recipe=$2 text=$3 steps=$4 out=$5; shift 5
  sets=(); for flag in "$@"; do sets+=(--set "$flag"); done
  (cd "$trees/$tree" && .venv/bin/python -m eval.campaign "$recipe" --set data="$texts/$text" --set steps="$steps" \
    --out "$root/runs/$out/$steps" --jobs "${JOBS:-2}" "${sets[@]}" ${MORE:-})
}
free="optimizer=schedule-free"
# The recipes with one arm in the place of theirs.
sed 's/schedule = "fot"/schedule = "schedule-free"/' $here/choose.toml > $trees/choose_free.toml
sed '/schedule = "\(wsd\|schedule-free\)"/d' $here/judge.toml | awk '/^\[\[arm/ {if (seen++) next} {print}' > $trees/judge_fot.toml
for steps in 300 1200; do
  go before $here/choose.toml choose $steps fot_samples/before
  go weights $here/choose.toml choose $steps fot_samples/weights
  go weights $here/choose.toml choose $steps fot_samples/weights_beta fot_beta=0.97
  go aim $here/choose.toml choose $steps fot_samples/aim
  go over $here/choose.toml choose $steps fot_samples/over_schedule_free $free fot_parts=noise
  go over $here/choose.toml choose $steps fot_samples/sf_envelope $free
  go lowest $here/choose.toml choose $steps fot_samples/sf_lowest $free fot_parts=noise
  go over "$root/$trees/choose_free.toml" choose $steps fot_samples/schedule_free
done
for steps in 1200 600; do
  go before $here/judge.toml judge $steps fot_samples_judge/rivals
  go over "$root/$trees/judge_fot.toml" judge $steps fot_samples_judge/chosen $free fot_parts=noise
done
# LoRA, with the code as it was built.
.venv/bin/python -m eval.campaign $here/lora.toml --jobs "${JOBS:-2}" ${MORE:-}
.venv/bin/python -m eval.campaign $here/lora_judge.toml --jobs "${JOBS:-2}" ${MORE:-}
