"""TTT-E2E language models, trained with Megatron-style parallelism."""

__version__ = "0.1.0"
