# The texts of this record: bash texts.sh OUT, with $LM_DATA. Of each novel the first KB kB are train, the next 30 kB val
# and the next 30 kB test; the speeches are train, val and test in the order of their years, out of domain for the others.
set -eu
cd "$1"
novels() {
  out=$1 kb=$2; shift 2; mkdir -p "$out"; rm -f "$out"/*.txt
  for name in "$@"; do
    from=$LM_DATA/novels/$name.txt
    head -c $((kb * 1000)) "$from" >> "$out/train.txt"
    tail -c +$((kb * 1000 + 1)) "$from" | head -c 30000 >> "$out/val.txt"
    tail -c +$((kb * 1000 + 30001)) "$from" | head -c 30000 >> "$out/test.txt"
  done
}
novels text-a 40 Doyle_Hound_1902 Cbronte_Jane_1847 Dickens_Expectations_1861 Wcollins_Woman_1860
novels text-b 40 Haggard_She_1887 Eliot_Felix_1866 Forster_Howards_1910 Kipling_Captains_1896
novels text-c 40 Burnett_Lord_1886 Gissing_Warburton_1903 Lawrence_Peacock_1911 Trollope_Phineas_1869
novels one-pass 560 Eliot_Adam_1859 Hardy_Tess_1891 Gissing_Women_1893 Trollope_Angel_1881 Thackeray_Esmond_1852 \
  Braddon_Audley_1862 James_Roderick_1875 Gaskell_Ruth_1855
mkdir -p speeches ood
python3 - "$LM_DATA/speeches/state_union.jsonl" <<'EOF'
import json, sys
text = "\n\n".join(json.loads(line)["text"] for line in open(sys.argv[1]))
for name, begin, end in (("train", 0, 160_000), ("val", 160_000, 280_000), ("test", 280_000, 400_000)):
    open(f"speeches/{name}.txt", "w").write(text[begin:end])
open("ood/speeches.txt", "w").write(text[400_000:520_000])
EOF
