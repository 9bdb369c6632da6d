# The texts of this record: bash texts.sh OUT, with $LM_DATA. Eight of 98 novels are held out, four for validation and four
# for test; "once" is the other 90, "few" the first 90 kB of each of them. Out of domain are web pages.
set -eu
mkdir -p "$1/once" "$1/few" "$1/ood"
cd "$1"
rm -f ./*/*.txt
held="Bennet_Imperial_1930 Cbronte_Villette_1853 Forster_View_1908 Schreiner_Farm_1883"
tested="Dickens_Oliver_1839 Hardy_Jude_1895 Lee_Albany_1884 Ward_Ashe_1905"
for name in $held; do head -c 120000 "$LM_DATA/novels/$name.txt" >> once/val.txt; done
for name in $tested; do head -c 200000 "$LM_DATA/novels/$name.txt" >> once/test.txt; done
for file in "$LM_DATA"/novels/*.txt; do
  name=$(basename "$file" .txt)
  case " $held $tested " in *" $name "*) continue ;; esac
  cat "$file" >> once/train.txt
  head -c 90000 "$file" >> few/train.txt
done
cp once/val.txt once/test.txt few/
python3 - "$LM_DATA/openwebtext-sample/openwebtext1000.jsonl" <<'EOF'
import json, sys
text = "\n\n".join(json.loads(line)["text"] for line in open(sys.argv[1]))
open("ood/web.txt", "w").write(text[:400_000])
EOF
