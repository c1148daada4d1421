"""What the published command lines of the DAPO experiments (arXiv 2509.07558) set, as the shell
hands it over: read off them, not made from our scripts or from what the tests expect of those."""

from pathlib import Path

DATA = Path.home() / "data"

ALL = {
    "data.apply_chat_template": "False",
    "data.filter_overlong_prompts": "True",
    "data.gen_batch_size": "384",
    "data.max_response_length": "3072",
    "data.train_batch_size": "128",
    "algorithm.adv_estimator": "grpo",
    "algorithm.filter_groups.enable": "True",
    "algorithm.filter_groups.max_num_gen_batches": "10",
    "algorithm.kl_ctrl.kl_coef": "0.0",
    "algorithm.use_kl_in_reward": "False",
    "actor_rollout_ref.model.path": "Qwen/Qwen2.5-3B",
    "actor_rollout_ref.model.use_remove_padding": "True",
    "actor_rollout_ref.actor.clip_ratio_c": "10.0",
    "actor_rollout_ref.actor.clip_ratio_high": "0.3",
    "actor_rollout_ref.actor.clip_ratio_low": "0.2",
    "actor_rollout_ref.actor.entropy_coeff": "0",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload": "True",
    "actor_rollout_ref.actor.fsdp_config.param_offload": "True",
    "actor_rollout_ref.actor.grad_clip": "1.0",
    "actor_rollout_ref.actor.kl_loss_coef": "0.0",
    "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
    "actor_rollout_ref.actor.optim.lr": "1e-6",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "4",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "32",
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": "1",
    "actor_rollout_ref.actor.use_kl_loss": "False",
    "actor_rollout_ref.ref.fsdp_config.param_offload": "True",
    "actor_rollout_ref.ref.ulysses_sequence_parallel_size": "1",
    "actor_rollout_ref.rollout.gpu_memory_utilization": "0.80",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": "4",
    "actor_rollout_ref.rollout.n": "8",
    "actor_rollout_ref.rollout.temperature": "1.0",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "1",
    "actor_rollout_ref.rollout.val_kwargs.do_sample": "True",
    "actor_rollout_ref.rollout.val_kwargs.n": "8",
    "actor_rollout_ref.rollout.val_kwargs.temperature": "1.0",
    "reward_model.overlong_buffer.len": "2048",
    "reward_model.overlong_buffer.penalty_factor": "1.0",
    "reward_model.reward_manager": "dapo",
    "trainer.logger": "[console,wandb]",
    "trainer.nnodes": "1",
    "trainer.project_name": "LatestVerlExperiment",
    "trainer.save_freq": "1000",
    "trainer.val_before_train": "False",
}
COUNTDOWN = ALL | {
    "data.max_prompt_length": "256",
    "data.train_files": f"{DATA}/countdown_nochat/train.parquet",
    "data.val_files": f"{DATA}/countdown_nochat/test.parquet",
    "algorithm.filter_groups.metric": "acc",
    "trainer.test_freq": "25",
    "trainer.total_epochs": "1500",
}
ORZ = f"{DATA}/open_reasoner_zero_nochat"
MATH = ALL | {
    "data.max_prompt_length": "1024",
    "data.train_files": f"{ORZ}/train.parquet",
    "data.val_files": f'["{ORZ}/test1.parquet","{ORZ}/test2.parquet","{ORZ}/test_amc.parquet"'
    f',"{ORZ}/test_minerva.parquet"]',
    "algorithm.filter_groups.metric": "seq_final_reward",
    "trainer.test_freq": "50",
    "trainer.total_epochs": "15",
}
# Name of the script → its settings.
PUBLISHED: dict[str, dict[str, str]] = {
    "countdown-dapo-3b-wo-sp-wo-of": COUNTDOWN
    | {
        "reward_model.overlong_buffer.enable": "False",
        "trainer.experiment_name": "countdown-dapo-3b-wo-sp-wo-of",
        "trainer.n_gpus_per_node": "4",
    },
    "countdown-dapo-3b-w-overlong-filtering": COUNTDOWN
    | {
        "algorithm.filter_overlong_response.enable": "True",
        "reward_model.overlong_buffer.enable": "False",
        "trainer.experiment_name": "countdown-dapo-3b-w-overlong-filtering",
        "trainer.n_gpus_per_node": "4",
    },
    "countdown-dapo-3b-w-soft-punishment": COUNTDOWN
    | {
        "reward_model.overlong_buffer.enable": "True",
        "trainer.experiment_name": "countdown-dapo-3b-w-soft-punishment",
        "trainer.n_gpus_per_node": "8",
    },
    "countdown-dapo-3b-delta-L-norm-alpha-1": COUNTDOWN
    | {
        "algorithm.use_grpopp": "True",
        "algorithm.grpopp_config.alpha": "1.0",
        "actor_rollout_ref.actor.use_grpopp": "True",
        "actor_rollout_ref.actor.grpopp_config.alpha": "1.0",
        "reward_model.overlong_buffer.enable": "False",
        "trainer.experiment_name": "countdown-dapo-3b-delta-L-norm-alpha-1.sh",
        "trainer.n_gpus_per_node": "4",
    },
    "math-dapo-3b-wo-sp-wo-of": MATH
    | {
        "reward_model.overlong_buffer.enable": "False",
        "trainer.experiment_name": "math-dapo-3b-wo-sp-wo-of",
        "trainer.n_gpus_per_node": "8",
    },
    "math-dapo-3b-w-overlong-filtering": MATH
    | {
        "algorithm.filter_overlong_response.enable": "True",
        "reward_model.overlong_buffer.enable": "False",
        "trainer.experiment_name": "math-dapo-3b-w-overlong-filtering",
        "trainer.n_gpus_per_node": "4",
    },
    "math-dapo-3b-w-soft-punishment": MATH
    | {
        "reward_model.overlong_buffer.enable": "True",
        "trainer.experiment_name": "math-dapo-3b-w-soft-punishment",
        "trainer.n_gpus_per_node": "8",
    },
    "math-dapo-3b-delta-L-norm-alpha-0.75": MATH
    | {
        "algorithm.use_grpopp": "True",
        "algorithm.grpopp_config.alpha": "0.75",
        "actor_rollout_ref.actor.use_grpopp": "True",
        "actor_rollout_ref.actor.grpopp_config.alpha": "0.75",
        "reward_model.overlong_buffer.enable": "False",
        "trainer.experiment_name": "math-dapo-3b-delta-L-norm-alpha-0.75",
        "trainer.n_gpus_per_node": "4",
    },
}
