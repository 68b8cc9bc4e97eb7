#!/usr/bin/env bash
# Train all bundled networks in stages; see docs/bundled.md. Run the script again to resume. It takes
# about ten hours on two CPU cores, writes runs/bundled/, and leaves the networks in
# runs/bundled/assets, in the layout of jax_idgrpo/synthetic/assets.
#   launch/bundled.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh ""

assets="runs/bundled/assets"
if [ ! -d "$assets" ]; then
    mkdir -p "runs/bundled"
    cp -r jax_idgrpo/synthetic/assets "$assets.part"
    mv "$assets.part" "$assets"
fi

# The decoder comes last: until then the pools of encoded clips are those of one VAE.
for stage in detector embedder judge vae vae_clips pictures clips phantom_pictures phantom_clips vae_decoder; do
    # A stage that is done only stores its network again.
    echo "== $stage"
    idgrpo finetune "configs/bundled_$stage.py" --workdir "runs/bundled/$stage"
done
cp -r "$assets/pipeline/vae" "$assets/phantom/"
