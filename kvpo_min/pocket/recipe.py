"""The settings of `kvpo-min demo`, with which the pocket model learns a taste in a few minutes (docs/LOG.md says what
else was tried). Films end with the block at whose event memory decides, and groups fork there."""

TRAINING = {
    "num_frames": 30, "fork": 27, "perturb_num_blocks": 1, "in_order": True, "groups_per_update": 6,
    "num_iterations": 5, "learning_rate": 1e-2, "lr_scheduler": "linear", "lr_warmup_steps": 0, "max_grad_norm": 0.04,
    "tau": 2.0, "kl_coef": 0.3, "prefix_coef": 15.0, "grad_steps": 2, "anchor_in_group": True, "fuse_mode": "none",
    "adv_eps": 0.2, "unsafe_scale": 1.0,
}  # fmt: skip
WEIGHTS = {"vq": 3.0, "ta": 3.0, "mq": 0.1}
EVENT = "from the,settles"  # words that every prompt holds
