"""Which model a session's states belong to, and whether a state fits it."""

from collections.abc import Sequence
from functools import cached_property

from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.hf.state_ttt_e2e import SequenceState, StateError, base_hash
from ttt_megatron.meta.learner import Learner


def base_settings(
    learner: Learner, bos_id: int | None
) -> dict[str, int | float | str | bool | None]:
    """What a sequence's state rests on beside the weights."""
    model, inner = learner.model.config, learner.inner
    return {
        "num_hidden_layers": model.num_layers,
        "num_suffix_layers": model.num_suffix_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads or model.num_heads,
        "intermediate_size": model.ffn_hidden_size,
        "prime_intermediate_size": model.prime_ffn_hidden_size or model.ffn_hidden_size,
        "window_size": model.window_size,
        "rope_theta": float(model.rope_theta),
        "norm_eps": float(model.norm_eps),
        "tie_embeddings": model.tie_embeddings,
        "vocab_size": model.vocab_size,
        "chunk_size": inner.chunk_size,
        "inner_lr": float(inner.lr),
        "clip": float(inner.clip),
        "bos_token_id": bos_id,
    }


def learner_hash(learner: Learner, bos_id: int | None) -> str:
    """The `base_hash` of a whole learner; reads every parameter once."""
    return base_hash(learner.model.named_parameters(), base_settings(learner, bos_id))


class BaseModel:
    """A learner's hash, taken when it is first asked for. Its parameters must not change after."""

    def __init__(self, learner: Learner, bos_id: int | None) -> None:
        self._learner, self._bos_id = learner, bos_id

    @cached_property
    def hash(self) -> str:
        """See `learner_hash`."""
        return learner_hash(self._learner, self._bos_id)


def refuse_other_mixers(model: ModelConfig) -> None:
    """Raises StateError for a model whose states are not kept: the format holds keys and values."""
    if set(model.mixer_kinds) - {"attention"}:
        raise StateError(
            f"model.mixers = {model.mixers}: states are kept of models with attention alone"
        )


def refuse_misfits(states: Sequence[SequenceState], learner: Learner, inner_steps: bool) -> None:
    """Raises StateError unless a session could have left these states behind, together."""
    if not states:
        raise StateError("no states: give one for each row of the session")
    for row, state in enumerate(states):
        problem = _misfit(state, learner, inner_steps)
        if problem:
            raise StateError(f"the state of row {row} does not fit this session: {problem}")
        if state.position != states[0].position:
            raise StateError(
                f"the state of row {row} is at position {state.position:,} and the first at "
                f"{states[0].position:,}: a session reads its rows in lock step, give states of "
                "one position"
            )


def _misfit(state: SequenceState, learner: Learner, inner_steps: bool) -> str | None:
    if bool(state.fast) != inner_steps:
        read = "with" if state.fast else "without"
        return f"it was read {read} inner steps; give it to a session {read} them"
    initial = learner.model.initial_fast_weights() if inner_steps else []
    fast = [weight for mlp in initial for weight in mlp]
    if [(w.shape, w.dtype) for w in state.fast] != [(w.shape, w.dtype) for w in fast]:
        return "its fast weights have other shapes"
    held, size = len(state.pending_tokens), learner.inner.chunk_size
    start = state.position - held
    if (inner_steps and (start != state.steps * size or not 0 < held <= size)) or (
        not inner_steps and (state.steps or held)
    ):
        return (
            f"position {state.position}, {state.steps} inner steps and {held} tokens of a chunk "
            f"of {size} contradict one another; read the document again"
        )
    vocabulary = learner.model.config.vocab_size or 0
    if held and not 0 <= int(state.pending_tokens.min()) <= int(state.pending_tokens.max()) < (
        vocabulary
    ):
        return f"a pending token is outside the vocabulary of {vocabulary}"
    return _other_shapes(state, learner, inner_steps)


def _other_shapes(state: SequenceState, learner: Learner, inner_steps: bool) -> str | None:
    """What differs from the shapes and the dtype of this model's activations, if anything."""
    model, config = learner.model, learner.model.config
    heads = (config.num_kv_heads or config.num_heads, model.head_dim)
    held = len(state.pending_tokens)
    later = max(config.num_suffix_layers - 1, 0) if inner_steps else 0
    early_entries = _visible(state.position, config.window_size)
    later_entries = _visible(state.position - held, config.window_size) + held
    entries = [early_entries] * (config.num_layers - later) + [later_entries] * later
    expected: list[tuple[int, ...]] = [(n, *heads) for n in entries for _ in "kv"]
    expected += [(held, config.hidden_size), (config.hidden_size,)]
    tensors = [*(x for kv in state.kv for x in kv), state.pending_entered, state.last_hidden]
    found = [tuple(x.shape) for x in tensors]
    if found != expected:
        return f"its tensors have shapes {found} instead of {expected}"
    dtypes = {x.dtype for x in tensors}
    if dtypes != {learner.compute_dtype}:
        return f"its tensors are {dtypes} and the session computes in {learner.compute_dtype}"
    return None


def _visible(position: int, window: int | None) -> int:
    """How many tokens before this position a token there can see."""
    return position if window is None else min(position, window - 1)
