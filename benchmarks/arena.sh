# All rows of the tables "head to head" and "reward hacking" in docs/results.md: what the files in benchmarks/data hold
# already is not computed again. Some 320 runs, 12 hours of training on one core. Runs in the
# root of the repository.
set -e
arena() { kvpo-min arena --forwards 17500 --evaluations 1 "$@"; }
memory() { arena --csv benchmarks/data/arena_settles.csv "$@"; }
noise() { arena --csv benchmarks/data/arena_wanders.csv --mode wanders "$@"; }
free() { "$@" --set prefix_coef=0; } # nothing holds the past
five="--seeds 0,1,2,3,4"

# where memory decides, the past held
memory $five --methods kvpo --evaluations 5
memory --methods cm_grpo,diffusion_nft --learning_rates 1e-3,3e-3,1e-2,3e-2 --evaluations 2
memory --methods flow_grpo --learning_rates 3e-3,1e-2,3e-2,1e-1 --evaluations 2
memory $five --methods neighbor_grpo,rwr --learning_rates 3e-3,1e-2,3e-2,1e-1
memory --methods dance_grpo,ar_copo
memory --methods astrolabe --learning_rates 1e-3,3e-3,1e-2
memory --methods best_of_n
# ... cells of the grid
memory --methods routing+energy --learning_rates 1e-2
memory --methods routing+distance --learning_rates 1e-3,3e-3,1e-2,3e-2
memory --methods routing+nft --learning_rates 3e-3,1e-2,3e-2,1e-1
memory --methods initial+nft,consistency+distance --learning_rates 1e-2 --seeds 0
memory --methods consistency+nft --learning_rates 3e-2 --seeds 0
# ... nothing held
free memory --methods kvpo --learning_rates 1e-3
free memory --methods kvpo --learning_rates 3e-4
free memory --methods diffusion_nft,flow_grpo --learning_rates 1e-2 --seeds 0
free memory --methods neighbor_grpo,dance_grpo,ar_copo --learning_rates 1e-3 --seeds 0
free memory --methods cm_grpo,rwr --learning_rates 3e-4 --seeds 0

# where noise decides, nothing held
free noise --methods kvpo --learning_rates 3e-4,1e-3,3e-3,1e-2,3e-2 $five
free noise --methods diffusion_nft $five
free noise --methods flow_grpo --learning_rates 1e-3,3e-3,1e-2 $five
free noise --methods cm_grpo --learning_rates 1e-4,3e-4,1e-3,3e-3
free noise --methods rwr --learning_rates 1e-4,3e-4,1e-3,3e-3,1e-2
free noise --methods dance_grpo --learning_rates 1e-3,3e-3,1e-2
free noise --methods neighbor_grpo,ar_copo --learning_rates 1e-4,3e-4,1e-3,3e-3,1e-2
noise --methods astrolabe --learning_rates 3e-4,1e-3,3e-3,1e-2
noise --methods astrolabe --learning_rates 1e-3,3e-3,1e-2 $five --set old_decay=0
noise --methods best_of_n
# ... cells of the grid
free noise --methods routing+energy --learning_rates 1e-3
free noise --methods routing+distance --learning_rates 3e-4,1e-3
free noise --methods routing+nft --learning_rates 1e-3,3e-3,1e-2
free noise --methods initial+nft,consistency+nft --learning_rates 1e-2
free noise --methods consistency+distance --learning_rates 3e-4
# ... the past held, in full and a tenth as hard
noise --methods kvpo --evaluations 5
noise --methods diffusion_nft,flow_grpo
noise --methods kvpo,diffusion_nft,flow_grpo --learning_rates 1e-2,3e-2 --set prefix_coef=1.5

# both events in one script
both() { arena --csv benchmarks/data/arena_mixture.csv --event "from the,settles,wanders" "$@"; }
both --methods kvpo --learning_rates 1e-2
both --methods diffusion_nft --learning_rates 3e-3 --seeds 0
free both --like left --methods kvpo --learning_rates 1e-3
free both --like left --methods diffusion_nft --learning_rates 1e-2 --seeds 0
both --like left --methods kvpo --learning_rates 1e-2 --seeds 0
both --like left --methods diffusion_nft --learning_rates 3e-3 --seeds 0

# KVPO's parts
part() { arena --csv benchmarks/data/arena_ablations.csv --methods kvpo --learning_rates 1e-2 --forwards 9000 --eval_prompts 64 "$@"; }
part
for change in kl_coef=0 kl_coef=5 kl_coef=20 anchor_in_group=false num_generations=4 num_generations=16 tau=0.5 tau=8 \
  fuse_mode=std fuse_mode=zscore unsafe_scale=0 nearest=1 prefix_coef=0 fork=21,perturb_num_blocks=3; do
  part --set $change
done

# reward hacking on purpose
hacked() { kvpo-min arena --csv benchmarks/data/arena_hacking.csv --methods kvpo --forwards 8750 --eval_prompts 64 "$@"; }
hacked --learning_rates 1e-3 --mq 0 --ta 0 --set prefix_coef=0,kl_coef=0
hacked --learning_rates 1e-3 --mq 0 --ta 0 --set prefix_coef=0,kl_coef=20
hacked --learning_rates 1e-3 --set prefix_coef=0,kl_coef=0
hacked --learning_rates 1e-2 --mq 0 --ta 0
hacked --learning_rates 1e-2
for change in kl_coef=0 kl_coef=1 kl_coef=10 kl_coef=1,selective=false kl_coef=0.1,selective=false; do
  noise --csv benchmarks/data/arena_selective.csv --methods astrolabe --learning_rates 3e-3 --seeds 0 --evaluations 2 \
    --mq 0 --ta 0 --eval_prompts 64 --set old_decay=0,$change
done

python benchmarks/tables.py # into docs/results.md
python benchmarks/arena_tables.py --regimes figures/arena.png
python benchmarks/arena_tables.py --hacking figures/hacking.png
