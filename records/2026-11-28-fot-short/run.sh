# All runs of this record: bash records/2026-11-28-fot-short/run.sh choose|judge TRY, from the root of a checkout, with
# $LM_DATA; ../2026-11-28-fot-sizes/run.sh makes its texts, SmolLM2's folder and the runs of FoT as it was, and
# ../2026-11-28-fot-parts/run.sh the tiny Qwen3 and its runs. The tries run in trees under runs/fot_short_tries, each
# with its patch. What has run is not run again. MORE, such as "--dry-run commands", goes to every campaign.
set -eu
here=records/2026-11-28-fot-short root=$PWD base=c8b16b1
export OMP_NUM_THREADS=1
trees=runs/fot_short_tries; mkdir -p $trees
for tree in before always measured finite; do
  [ -e "$trees/$tree" ] && continue
  git worktree add --detach "$trees/$tree" $base
  ln -s "$root/.venv" "$root/runs" "$trees/$tree"
  [ $tree = before ] || git -C "$trees/$tree" apply "$root/$here/$tree.patch"
done
go() { # TREE RECIPE OUT MORE...
  tree=$1 recipe=$2 out=$3; shift 3
  (cd "$trees/$tree" && .venv/bin/python -m eval.campaign "$root/$here/$recipe.toml" --out "runs/fot_short/$out" \
    --jobs "${JOBS:-1}" "$@" ${MORE:-})
}
if [ "$1" = choose ]; then
  for tree in always measured finite; do
    go $tree smollm2 $tree/smollm2 --seeds 61
    go $tree mini $tree/mini --seeds 51
  done
else
  go "$2" smollm2 "$2/smollm2" --seeds 62
  go before smollm2 before/smollm2 --seeds 62
  go "$2" mini "$2/mini" --seeds 52
  go "$2" lora "$2/lora"
  go before smollm2 rivals/linear --seeds 62 --set schedule=linear
  go before smollm2 rivals/schedule-free --seeds 62 --set schedule=schedule-free
fi
