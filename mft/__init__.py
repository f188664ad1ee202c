"""mft: fine-tuning of large language models on several tasks at once, composed with Hydra."""

__version__ = "0.1.0"
