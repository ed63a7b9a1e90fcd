"""Which pipeline stages a rank holds, and reading through all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.meta.learner import Learner, LearnerOutput
from ttt_megatron.meta.part import Part
from ttt_megatron.model.stage import Stage, stages
from ttt_megatron.parallel.groups import Groups
from ttt_megatron.parallel.stage_links import StageLinks
from ttt_megatron.planning.stages import stage_blocks


def own_stages(config: RunConfig, groups: Groups) -> list[Stage]:
    """This rank's stages in the order it takes them; without pipelining the whole model as one.

    Stage i is on pipeline rank i mod size.
    """
    size, turns = groups.pipeline_size, config.parallel.virtual_pipeline
    blocks = stage_blocks(config, size, size * turns)
    return stages(blocks, config.model.num_suffix_layers)[groups.pipeline_rank :: size]


@torch.no_grad()
def read_in_stages(
    learners: Sequence[Learner],
    links: StageLinks | None,
    batch: tuple[Tensor, Tensor, Tensor],
    inner_lr: float,
    part: Part,
    *,
    final_step: bool = False,
) -> LearnerOutput | None:
    """Evaluates a batch: tokens, targets and mask [b, T]; None on ranks without the last stage.

    `final_step` as in the learner's `forward`. Nobody waits for a rank behind, so that several
    batches are on their way at once.
    """
    tokens, targets, mask = batch
    for learner in learners:
        stage, stream = learner.model.stage, None
        if links is not None and not stage.is_first:
            width = learner.model.config.hidden_size
            stream = links.receive_stream(tokens, width, learner.compute_dtype)
        stream = learner.run_prefix(tokens, part, stream=stream)
        if stage.is_last:
            return learner.run_suffix(stream, targets, mask, inner_lr, part, final_step=final_step)
        assert links is not None
        links.send_stream(stream)
    return None
