"""The module that is trained: a language model together with its inner loop."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ttt_megatron.meta.float8  # noqa: F401  (registers what float8 does with operands)
from ttt_kernels import RoundedWeights
from ttt_megatron.config.schema import InnerConfig, ModelConfig
from ttt_megatron.meta import inner_step
from ttt_megatron.meta.forward_sweep import SweepReport
from ttt_megatron.meta.meta_loss import default_segment, meta_loss, read_sequence
from ttt_megatron.meta.part import WHOLE, Part
from ttt_megatron.meta.passes import DIRECT, Runner
from ttt_megatron.meta.problem import InnerSettings, Problem, chunk_token_weights
from ttt_megatron.meta.substitute import suffix_parameters
from ttt_megatron.model.float8 import Products, float8_layers, use_float8
from ttt_megatron.model.init import initialize
from ttt_megatron.model.slots import Slots
from ttt_megatron.model.stage import Stage
from ttt_megatron.model.transformer import LanguageModel
from ttt_megatron.tracing import span


@dataclass(kw_only=True)
class LearnerOutput:
    """Results of a batch; everything but the loss is detached.

    loss: scalar, the mean over sequences and chunks of the chunk losses; chunk_losses [b, N];
    token_nll [b, T] (masked tokens included); and with inner steps inner_grad_norms [b, steps]
    before the clip, clipped_share (0-d) and drift [b] = ‖W_end − W_0‖/‖W_0‖. Of sequences in
    parts, all are the part's own; the loss is its share, and the parts' losses sum to the whole.
    """

    loss: Tensor
    chunk_losses: Tensor
    token_nll: Tensor
    inner_grad_norms: Tensor | None = None
    clipped_share: Tensor | None = None
    drift: Tensor | None = None
    logits: dict[int, Tensor] | None = None
    fast_weights: list[Tensor] | None = None


class Learner(nn.Module):
    """A language model that learns while it reads, ready to be trained; or a stage of one.

    dtype is that of the parameters (float32, or float64), compute_dtype that of activations;
    `float8` makes the products of static linear maps, if they are to be in float8.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        inner: InnerConfig,
        *,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        recompute_prefix: bool = False,
        seed: int = 1,
        slots: Slots | None = None,
        stage: Stage | None = None,
        float8: Products | None = None,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.compute_dtype = compute_dtype or dtype
        self.recompute_prefix = recompute_prefix
        self.runner: Runner = DIRECT
        self.rounded = RoundedWeights()
        self.model = LanguageModel(model_config, slots, stage).to(dtype)
        initialize(self.model, model_config, seed)
        if float8 is not None:
            use_float8(self.model, float8)

    def begin_pass(self) -> None:
        """Take note of the weights as they are. The passes of this class do so by themselves."""
        for layer in float8_layers(self.model).values():
            layer.float8.begin_pass(layer.weight)

    def begin_sweeps(self) -> None:
        """The same for passes with inner steps, which multiply by the suffix's chunk by chunk."""
        within = {id(slot.tensor) for slot in suffix_parameters(self.model)}
        chosen = [w for w in self._static_matrices() if id(w) in within]
        self.rounded.renew(chosen, self.compute_dtype)

    def begin_reading(self, inner_steps: bool) -> None:
        """The same for a session, which multiplies by all weights token after token.

        Without inner steps the prime MLPs' are among them.
        """
        self.begin_pass()
        fast = [] if inner_steps else inner_step.flatten(self.model.initial_fast_weights())
        self.rounded.renew([*self._static_matrices(), *fast], self.compute_dtype)

    def _static_matrices(self) -> list[Tensor]:
        """Slow weights of products in the compute dtype: of an embedding only if it is the head."""
        model = self.model
        others = [layer.weight for layer in float8_layers(model).values()]
        others += inner_step.flatten(model.initial_fast_weights())
        if model.output is not None or not model.stage.is_last:
            others += list(model.embedding.parameters()) if hasattr(model, "embedding") else []
        left_out = {id(weight) for weight in others}
        return [p for p in model.parameters() if p.dim() == 2 and id(p) not in left_out]

    @property
    def fast_parameter_names(self) -> list[str]:
        """Names of the parameters that are fast weights' initial values."""
        return [name for name, _ in self.named_parameters() if ".prime_mlp." in name]

    def settings(self, inner_lr: float, length: int) -> InnerSettings:
        """The inner loop's settings for sequences of `length` tokens."""
        inner = self.inner
        segment = 0
        if inner.two_level:
            num_chunks = -(-length // inner.chunk_size)
            segment = inner.segment_chunks or default_segment(num_chunks)
        return InnerSettings(
            chunk_size=inner.chunk_size,
            lr=inner_lr,
            clip=inner.clip,
            policy=inner.memory_policy,
            segment_chunks=segment,
            second_order=inner.mode != "first_order",
        )

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        mask: Tensor,
        inner_lr: float | None = None,
        part: Part = WHOLE,
        *,
        inner_steps: bool | None = None,
        final_step: bool = False,
        logits_of: tuple[int, ...] = (),
    ) -> LearnerOutput:
        """Loss of a batch: tokens and targets [b, T] int64, mask [b, T] bool.

        inner_lr None is the fully warmed rate. `part` says which part of the sequences the batch
        is, if not the whole. inner_steps None takes the mode's: in training,
        `meta` and `first_order` step; in evaluation (no grad) `naive` does too. `final_step`
        also steps after the last chunk, `logits_of` names chunks whose logits are returned; both
        are for evaluation.
        """
        entered = self.run_prefix(tokens, part, inner_steps=inner_steps)
        return self.run_suffix(
            entered,
            targets,
            mask,
            inner_lr,
            part,
            inner_steps=inner_steps,
            final_step=final_step,
            logits_of=logits_of,
        )

    def takes_steps(self, inner_steps: bool | None = None) -> bool:
        """Whether a pass that begins now takes inner steps; None as in `forward`."""
        if inner_steps is None:
            training = torch.is_grad_enabled()
            stepping = ("meta", "first_order") if training else ("meta", "first_order", "naive")
            inner_steps = self.inner.mode in stepping
        return inner_steps and self.model.config.num_suffix_layers > 0

    def run_prefix(
        self,
        tokens: Tensor,
        part: Part = WHOLE,
        *,
        stream: Tensor | None = None,
        inner_steps: bool | None = None,
    ) -> Tensor:
        """The first half of `forward`, up to where inner steps matter: [b, T, H].

        Without inner steps that is up to the output head. A stage but the first goes on from the
        `stream` of the one before, and a stage but the last returns its own.
        """
        self.begin_pass()
        model, again = self.model, self.recompute_prefix
        with span("prefix forward"):
            x = model.embed(tokens, self.compute_dtype) if stream is None else stream
            rotation = model.rotations(part.start, tokens.shape[1], x)
            if self.takes_steps(inner_steps):
                x = model.prefix_blocks(x, rotation, again, part)
                return model.enter_suffix(x, rotation, part) if model.stage.is_last else x
            x = model.plain_blocks(x, rotation, again, part)
            normed: Tensor = model.final_norm(x) if model.stage.is_last else x
            return normed

    def run_suffix(
        self,
        entered: Tensor,
        targets: Tensor,
        mask: Tensor,
        inner_lr: float | None = None,
        part: Part = WHOLE,
        *,
        inner_steps: bool | None = None,
        final_step: bool = False,
        logits_of: tuple[int, ...] = (),
    ) -> LearnerOutput:
        """The second half of `forward`, from what `run_prefix` returned."""
        weights = chunk_token_weights(mask, self.inner.chunk_size)
        weights = weights.to(torch.promote_types(self.compute_dtype, torch.float32))
        if not self.takes_steps(inner_steps):
            return self._plain(entered, targets, weights, logits_of, part)
        self.begin_sweeps()
        length = targets.shape[1]
        rate = self.inner.lr if inner_lr is None else inner_lr
        problem = Problem(
            model=self.model,
            settings=self.settings(rate, length),
            targets=targets,
            token_weights=weights,
            rotation=self.model.rotations(part.start, length, entered),
            part=part,
            runner=self.runner if torch.is_grad_enabled() else DIRECT,
            rounded=self.rounded,
        )
        if torch.is_grad_enabled():
            loss, run = meta_loss(problem, entered)
            return self._stepped(problem, loss, run.report, run.state.fast)
        report, fast = read_sequence(problem, entered, final_step=final_step, logits_of=logits_of)
        loss = (report.token_nll * weights).sum() * problem.chunk_weight
        return self._stepped(problem, loss, report, fast)

    def _plain(
        self,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor,
        logits_of: tuple[int, ...],
        part: Part,
    ) -> LearnerOutput:
        size = self.inner.chunk_size
        num_chunks = -(-part.whole_length(targets.shape[1]) // size)
        entered = self.model.slots.head.enter(hidden)
        share = weights / (num_chunks * targets.shape[0])
        loss, nll = self.model.loss(entered, targets, share)
        return LearnerOutput(
            loss=loss,
            chunk_losses=_chunk_sums(nll * weights, size),
            token_nll=nll,
            logits={
                chunk: self.model.entered_logits(entered[:, chunk * size : (chunk + 1) * size])
                for chunk in logits_of
            },
        )

    def _stepped(
        self, problem: Problem, loss: Tensor, report: SweepReport, fast: list[Tensor]
    ) -> LearnerOutput:
        nll = report.token_nll
        output = LearnerOutput(
            loss=loss,
            chunk_losses=_chunk_sums(nll * problem.token_weights, problem.settings.chunk_size),
            token_nll=nll,
            logits=report.logits,
            fast_weights=None if torch.is_grad_enabled() else fast,
        )
        initial = [w.detach() for w in inner_step.flatten(self.model.initial_fast_weights())]
        sum_parts = self.model.slots.sum_parts
        moved = [w - start for w, start in zip(fast, initial, strict=True)]
        size = inner_step.norm([w.unsqueeze(0) for w in initial], sum_parts)
        output.drift = inner_step.norm(moved, sum_parts) / size
        if report.gradient_norms:
            norms = torch.stack(report.gradient_norms, dim=1)
            output.inner_grad_norms = norms
            clip = problem.settings.clip
            output.clipped_share = (norms >= clip).float().mean() if clip else norms.new_zeros(())
        return output


def _chunk_sums(x: Tensor, chunk_size: int) -> Tensor:
    """Sums of [b, T] over chunks: [b, N]."""
    return torch.stack([part.sum(-1) for part in x.split(chunk_size, dim=1)], dim=1)
