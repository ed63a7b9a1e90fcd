"""Recipes: what a run is, read from YAML, checked before anything starts. Knows no torch."""

from ttt_megatron.config.convert import from_dict, to_dict, to_yaml
from ttt_megatron.config.recipe import load_recipe
from ttt_megatron.config.reference import KeyReference, describe, key_references
from ttt_megatron.config.schema import (
    DataConfig,
    InnerConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrackingConfig,
    TrainingConfig,
)
from ttt_megatron.config.validate import validate

__all__ = [
    "DataConfig",
    "InnerConfig",
    "KeyReference",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "TrackingConfig",
    "TrainingConfig",
    "describe",
    "from_dict",
    "key_references",
    "load_recipe",
    "to_dict",
    "to_yaml",
    "validate",
]
