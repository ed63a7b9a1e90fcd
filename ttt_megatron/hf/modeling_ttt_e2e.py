"""TTT-E2E for `transformers`: a language model that keeps learning while it reads and writes.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=100)

Inner steps are taken unless `ttt=False` is given, to a call, to generate() or to
from_pretrained(). The returned cache goes on from where it is: see `cache_ttt_e2e.py`.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .cache_ttt_e2e import TTTE2ECache
from .configuration_ttt_e2e import TTTE2EConfig
from .layers_ttt_e2e import Block, RMSNorm, linear
from .reading_ttt_e2e import Network, Reader, plain_pass
from .state_ttt_e2e import base_hash

_ASKED = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
# What this version of transformers calls the cache between two steps of generate().
_CACHE = "cache" if "cache" in _ASKED else "past_key_values"


@dataclass
class TTTE2EOutput(ModelOutput):
    """loss where labels were given, logits [b, T, V] (or of the last positions), the cache."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: TTTE2ECache | None = None

    @property
    def past_key_values(self) -> TTTE2ECache | None:
        """The cache."""
        return self.cache


class TTTE2EPreTrainedModel(PreTrainedModel):
    """What loading and saving ask."""

    config: TTTE2EConfig
    config_class = TTTE2EConfig
    base_model_prefix = "model"
    _input_embed_layer = "embedding"
    _no_split_modules = ["TTTE2EModel"]  # noqa: RUF012
    _is_stateful = True
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1.0)


class TTTE2EModel(TTTE2EPreTrainedModel):
    """The parameters but those of an untied head."""

    def __init__(self, config: TTTE2EConfig) -> None:
        super().__init__(config)
        first = config.num_hidden_layers - config.inner["num_suffix_layers"]
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, prime=index >= first) for index in range(config.num_hidden_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()


class TTTE2EForCausalLM(TTTE2EPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: TTTE2EConfig) -> None:
        super().__init__(config)
        self.model = TTTE2EModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._hash: tuple[tuple[Any, ...], str] | None = None
        self.post_init()

    def initial_fast_weights(self) -> list[Tensor]:
        """What every text's fast weights start from: fc1, fc2 of each prime MLP, [out, in]."""
        return self._network().initial_fast_weights()

    def base_hash(self) -> str:
        """SHA-256 of the weights and of the settings that a text's state rests on."""
        named = {name.removeprefix("model."): p for name, p in self.named_parameters()}
        if self.config.tie_word_embeddings:
            named.pop("lm_head.weight", None)
        elif "lm_head.weight" in named:
            named["output.weight"] = named.pop("lm_head.weight")
        state = tuple((p.data_ptr(), p._version, p.dtype) for p in named.values())
        if self._hash is None or self._hash[0] != state:
            # Values count, not how they are stored: 16 bits are told in 32.
            wide = (
                (k, p.to(torch.promote_types(p.dtype, torch.float32))) for k, p in named.items()
            )
            self._hash = state, base_hash(wide, self.config.base_settings())
        return self._hash[1]

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As everywhere; `cache` is a cache to go on from, in any version of transformers."""
        for name in ("cache", "past_key_values"):
            if kwargs.get(name) is not None:
                kwargs[_CACHE] = kwargs.pop(name)
        return super().generate(inputs, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: TTTE2ECache | None = None,
        past_key_values: TTTE2ECache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        ttt: bool | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> TTTE2EOutput | tuple[Any, ...]:
        """Read input_ids [b, T] int64 after what the cache has read.

        attention_mask [b, T], or with more columns to the left, is 0 where there is no token:
        such columns are passed over, wherever they are, and have logits of no meaning. labels
        [b, T] (−100 is none) are shifted here, as usual. logits_to_keep last positions have
        logits; 0 is all. `ttt` None takes the cache's way, or the configuration's.

        Gradients flow with `ttt=False` alone, where the model trains, labels are given or no cache
        is asked for: with inner steps, train with the framework this comes from. Raises ValueError
        for what cannot be read.
        """
        if input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError("input_ids [b, T ≥ 1] are needed: inner steps learn from tokens")
        cache = cache if cache is not None else past_key_values
        learns = self._learns(cache, ttt)
        if learns and labels is not None and self.training:
            raise ValueError(
                "inner steps carry no gradient for training: call model.eval(), or fine-tune the "
                "plain model with ttt=False"
            )
        mask = self._mask(input_ids, attention_mask)
        keep = logits_to_keep if logits_to_keep and labels is None else input_ids.shape[1]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        trains = self.training or labels is not None or not use_cache
        if not learns and cache is None and trains and torch.is_grad_enabled():
            hidden = plain_pass(self._network(), input_ids, mask)[:, -keep:]
        else:
            if cache is None:
                cache = TTTE2ECache(self.config, len(input_ids), ttt)
            # Inner steps differentiate, which tensors of inference mode forbid.
            with torch.inference_mode(False), torch.no_grad():
                hidden = self._read(input_ids, mask, cache, keep)
        logits = linear(hidden, self.lm_head.weight)
        loss = None if labels is None else _loss(logits, labels)
        output = TTTE2EOutput(loss=loss, logits=logits, cache=cache if use_cache else None)
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next call in generate(): the columns the cache has not seen."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if next_sequence_length is None and cache is not None:
            whole = attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
            next_sequence_length = input_ids.shape[1] - (cache.columns if whole else 0)
            if next_sequence_length < 1:
                raise ValueError(
                    f"input_ids have {input_ids.shape[1]} columns and the cache has read "
                    f"{cache.columns}: give the whole text, or call cache.count_from_here() and "
                    "give only what follows"
                )
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        passed = ("use_cache", "logits_to_keep", "ttt")
        return {
            "input_ids": input_ids.contiguous(),
            "attention_mask": attention_mask,
            "cache": cache,
            **{name: kwargs[name] for name in passed if name in kwargs},
        }

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> bool:
        """None is made here: the first call makes it, as many rows as it has."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: this model has "
                "a cache of its own; leave it out"
            )
        return False

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        updated = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **kwargs
        )
        updated.pop("cache", None)
        if outputs.cache is not None:
            updated[_CACHE] = outputs.cache
        return updated

    def _network(self) -> Network:
        model: Any = self.model
        return Network(
            self.config,
            model.embedding.weight,
            list(model.layers),
            model.final_norm,
            self.lm_head.weight,
        )

    def _learns(self, cache: TTTE2ECache | None, ttt: bool | None) -> bool:
        if cache is None:
            wanted = self.config.inner["enabled"] if ttt is None else ttt
            return bool(wanted) and self.config.inner["num_suffix_layers"] > 0
        if ttt is not None and ttt != cache.learns and self.config.inner["num_suffix_layers"]:
            raise ValueError(
                f"ttt={ttt}, but the cache was begun with ttt={cache.learns}: go on the same way, "
                "or read with a new cache"
            )
        return cache.learns

    def _mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """[b, T] bool, or None where every column is a token."""
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"input_ids hold {wrong}, and the vocabulary has {self.config.vocab_size} ids: use "
                "the tokenizer beside the model"
            )
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2 or attention_mask.shape[1] < input_ids.shape[1]:
            raise ValueError(
                f"attention_mask has the shape {list(attention_mask.shape)}: it must be [b, T] "
                f"for input_ids of the shape {list(input_ids.shape)}"
            )
        mask = attention_mask[:, -input_ids.shape[1] :].bool().to(input_ids.device)
        return None if bool(mask.all()) else mask

    def _read(
        self, input_ids: Tensor, mask: Tensor | None, cache: TTTE2ECache, keep: int
    ) -> Tensor:
        """Final hidden states of the last `keep` columns, [b, keep, H]."""
        b, width = input_ids.shape
        if cache.batch != b:
            raise ValueError(f"input_ids have {b} rows and the cache {cache.batch}")
        columns = torch.arange(width, device=input_ids.device).expand(b, width)
        lengths, tokens = [width] * b, input_ids
        if mask is not None:
            columns = torch.argsort(~mask, dim=1, stable=True)
            tokens, lengths = input_ids.gather(1, columns), mask.sum(1).tolist()
        network = self._network()
        kept = network.head.new_zeros(b, keep + 1, self.config.hidden_size)

        def store(rows: Any, starts: Any, sizes: Any, hidden: Tensor) -> None:
            for i, (row, start, size) in enumerate(zip(rows, starts, sizes, strict=True)):
                places = columns[row, start : start + size] - (width - keep)
                # What is not wanted goes to one place too many.
                kept[row, places.where(places >= 0, keep)] = hidden[i, :size]

        Reader(network, cache).read(tokens, lengths, store)
        cache.columns += width
        return kept[:, :keep]


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), labels[:, 1:].to(logits.device).flatten())
