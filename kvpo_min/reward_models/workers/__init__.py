"""Scripts that run inside other environments and answer `kvpo_min.reward_models.WorkerReward`. Never imported here."""
