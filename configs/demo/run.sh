#!/bin/sh
# The complete job on a small corpus, from annotated clips to a LoRA. `make demo` runs this.
set -eu

step() { printf '\n== %s\n$ %s\n' "$1" "$2"; sh -c "$2"; }

step "1. A small annotated corpus, made by ffmpeg" \
    "wanprep demo-corpus demo/corpus ${CLIPS:-}"
step "2. The plan: a fixed list of clips in units, so that a build that was killed continues with the same units" \
    "wanprep plan configs/demo/prep.yaml"
step "3. Download from a local server, filter, decode, encode, write shards (encoders: small, random weights)" \
    "wanprep build-shards configs/demo/prep.yaml --serve demo/corpus"
step "4. What is in the shards" "wanshards ls demo/shards"
step "   Check every byte" "wanshards verify demo/shards"
key=$(wanshards ls demo/shards --keys | head -n 1)
step "   One sample" "wanshards show demo/shards $key"
step "5. The base model: all weights of a small DiT (real architecture), trained on the clips named base-…" \
    "wantrain fit configs/demo/base.yaml"
step "6. The LoRA, on the other clips" "wantrain fit configs/demo/train.yaml"

cat <<'END'

The shards are in  demo/shards   (latents and text of small random encoders: for demonstration only)
The LoRA is in     demo/run/lora.safetensors

With the real checkpoint and your own corpus:
  wantrain doctor
  wanprep scan         configs/mbc_832x480.yaml -o corpus.location=/data/mbc
  wanprep build-shards configs/mbc_832x480.yaml -o corpus.location=/data/mbc -o encoders.checkpoint=/models/Wan2.2-TI2V-5B -o output=/data/shards
  wantrain fit configs/ti2v_5b_2xv100.yaml -o data.root=/data/shards -o model.checkpoint=/models/Wan2.2-TI2V-5B
END
