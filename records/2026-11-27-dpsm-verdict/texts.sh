# usage: mkdata.sh OUT KB NOVEL... : the first KB kB of each are train, the next 30 kB val, the next 30 kB test
out=$1; kb=$2; shift 2; mkdir -p $out; rm -f $out/*.txt
for n in "$@"; do f=$LM_DATA/novels/$n.txt
 head -c $((kb*1000)) $f >> $out/train.txt
 tail -c +$((kb*1000+1)) $f | head -c 30000 >> $out/val.txt
 tail -c +$((kb*1000+30001)) $f | head -c 30000 >> $out/test.txt; done
