"""The engine that a recipe asks for."""

from collections.abc import Sequence

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.meta.learner import Learner
from ttt_megatron.parallel.groups import Groups
from ttt_megatron.training.deepspeed_engine import DeepSpeedEngine
from ttt_megatron.training.engine import Engine
from ttt_megatron.training.megatron_engine import MegatronEngine


def build_engine(learners: Sequence[Learner], config: RunConfig, groups: Groups) -> Engine:
    """Puts this rank's parts of the model, on the CPU, into an engine on its device. Collective."""
    if config.optimizer.engine == "deepspeed":
        [learner] = learners
        return DeepSpeedEngine(learner, config, groups)
    return MegatronEngine(learners, config, groups)
