"""Other trainers' names for a setting, so that their users are pointed to its name here.

The names are those of MFTCoder's JSON (docs/migrating.md has them with the differences), of transformers'
TrainingArguments and of LLaMA-Factory.
"""

from __future__ import annotations

THEIR_NAMES = {
    # the base and what of it is trained
    "model.path": "model_name_or_path pretrained_model_path model_name base_model model_path",
    "model": "model_type",
    "model.revision": "model_revision",
    "model.attention": "attn_implementation attn_impl flash_attn",
    "model.gradient_checkpointing": "gradient_checkpointing_kwargs disable_gradient_checkpointing",
    "peft": "peft_type finetuning_type use_lora use_peft",
    "peft=qlora": "quantization load_in_4bit",
    "peft=qlora peft.bits": "quantization_bit load_in_8bit",
    "peft.path": "adapter_name_or_path",
    "peft.rank": "lora_rank lora_r",
    "peft.alpha": "lora_alpha",
    "peft.dropout": "lora_dropout",
    "peft.targets": "lora_target lora_target_modules target_modules",
    "peft.modules_to_save": "additional_target",
    "peft.use_rslora": "use_rslora",
    # data
    "data.paths": "data_paths data_path dataset dataset_dir dataset_name train_file load_raw_dataset",
    "data.split": "data_split val_size",
    "task.NAME.valid": "eval_dataset validation_file",
    "task.NAME.weight": "task_weights",
    "data.mixture": "interleave_probs mix_strategy",
    "data": "tokenize_mode padding_mode",
    "data=pack": "packing neat_packing",
    "data.seq_length": "cutoff_len max_seq_length max_seq_len max_length model_max_length block_size",
    "data.template": "chat_template",
    "data.limit": "max_samples max_train_samples",
    # loss, optimizer, schedule
    "loss": "weighted_loss_mode",
    "optimizer": "optim",
    "optimizer.lr": "learning_rate",
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.beta1 and optimizer.beta2": "betas",
    "optimizer.eps": "adam_epsilon",
    "scheduler": "lr_scheduler_type",
    "scheduler.warmup": "num_warmup_steps warmup_steps warmup_ratio",
    # the loop
    "train.epochs": "num_train_epochs num_epochs",
    "train.max_steps": "max_train_steps",
    "train.per_device_batch_size": "per_device_train_batch_size per_gpu_train_batch_size batch_size "
    "micro_batch_size auto_find_batch_size",
    "train.global_batch_size": "train_batch_size",
    "train.gradient_accumulation_steps": "grad_accum gradient_accumulation",
    "train.log_every": "log_interval logging_steps",
    "train.save_every": "checkpointing_steps save_steps save_interval",
    "train.eval_every": "evaluation_steps eval_steps eval_interval",
    "train.eval_at_start": "eval_on_start",
    "train.eval_samples": "max_eval_samples",
    "train.keep": "saving_limit save_total_limit",
    "train.best": "metric_for_best_model",
    "train.early_stopping_stall_num": "early_stopping_patience",
    "train.resume": "resume_from_checkpoint",
    "train.max_grad_norm": "clip_grad",
    "train.precision": "mixed_precision torch_dtype dtype",
    "train.precision=bf16": "bf16",
    "train.precision=fp16": "fp16",
    "train.seed": "data_seed",
    # where it runs and what is recorded
    "name": "experiment_name",
    "tracking": "report_to",
    "tracking.tensorboard.dir": "tb_dir logging_dir",
    "tracking.mlflow.run_name": "run_name",
    "dist": "distributed_type",
    "dist=zero2 or dist=zero3": "deepspeed",
    "dist=fsdp": "fsdp",
    "launch.nproc": "nproc_per_node num_processes",
    "launch.nnodes": "num_machines",
    "launch.node_rank": "machine_rank",
    "launch.main_address": "master_addr main_process_ip",
    "launch.main_port": "master_port main_process_port",
}
"""The setting here, a group, or an override as it is written → its names elsewhere."""

HERE = {theirs: ours for ours, names in THEIR_NAMES.items() for theirs in names.split()}
"""Name elsewhere → the setting here."""


def setting_here(name: str) -> str:
    """Returns what a setting of another trainer is called here ("optimizer.lr"), "" for any other name."""
    return HERE.get(name.replace("-", "_").lower(), "")
