# Tries each stack of patches in a copy of the tree: its kernel tests on the GPU, then the layer at EP1 and EP2.
# bash candidates/adopt.sh [stack ...]   a stack is patches joined by +, "main" is none. About 45 s a stack, first ones compile.

ROOT=$PWD; OUT=${OUT:-/tmp}
STACKS=${@:-"main carried joined wgrad joined+wgrad_on_joined joined+wgrad_on_joined+tma"}
prepare(){ rm -rf /tmp/try_$1; mkdir /tmp/try_$1; cp -r fluid_hf integrations tests setup.cfg pyproject.toml /tmp/try_$1/
 for p in ${1//+/ }; do [ $p = main ] || patch -s -d /tmp/try_$1 -p1 < $ROOT/candidates/adopt_$p.patch || echo "PATCH FAILED $1 $p"; done; }
into(){ cd /tmp/try_$1; export PYTHONPATH=$ROOT/.gpu-site:$PWD:$PWD/tests; }
for s in $STACKS; do prepare $s; done
L="python3 -m fluid_hf.cli bench layer --layers 2 --tokens 8192 --shapes qwen3-30b-a3b qwen1.5-moe-a2.7b"
for s in $STACKS; do ( into $s; timeout 150 python3 -m pytest tests/test_gemm_kernels.py -q -p no:cacheprovider > $OUT/test_$s.txt 2>&1; timeout 90 $L --ep 1 --repeats 1 --variants fluid > /dev/null 2>&1 ) & done; wait
for s in $STACKS; do echo "== $s: $(tail -1 $OUT/test_$s.txt)"; grep -E "^(FAILED|ERROR)" $OUT/test_$s.txt | head -5; done
for s in $STACKS; do ( into $s; timeout 60 $L --ep 1 2 --variants fluid serial --json $OUT/layer_$s.json > $OUT/layer_$s.txt 2>&1 ); echo "== $s"; grep -h "^|\|fluid" $OUT/layer_$s.txt | tail -8 | cut -c1-150; done
