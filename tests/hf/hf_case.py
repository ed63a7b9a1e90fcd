"""The model of a learner as transformers loads it, without files."""

from ttt_megatron.exchange.hf_config import hf_parameter_name, to_hf_config
from ttt_megatron.hf.modeling_ttt_e2e import TTTE2EForCausalLM


def as_hf(learner, bos_id):
    """A model of transformers with a learner's weights, in their dtype."""
    config = to_hf_config(learner.model.config, learner.inner, bos_id=bos_id, dtype="float32")
    model = TTTE2EForCausalLM(config).to(learner.model.head_weight.dtype).eval()
    weights = {hf_parameter_name(k): v for k, v in learner.model.state_dict().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


def read_pieces(model, tokens, sizes, cache=None, **options):
    """Logits of reading in pieces of these sizes, the last repeated to the end; and the cache."""
    import torch

    logits, start, sizes = [], 0, list(sizes)
    while start < tokens.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        with torch.no_grad():
            output = model(tokens[:, start : start + size], cache=cache, **options)
        cache, start = output.cache, start + size
        options = {}
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache
