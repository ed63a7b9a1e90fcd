"""An exported model, loaded to be served."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from ttt_megatron.errors import UserError
from ttt_megatron.hf.cache_ttt_e2e import TTTE2ECache
from ttt_megatron.hf.modeling_ttt_e2e import TTTE2EForCausalLM
from ttt_megatron.service.errors import RequestError
from ttt_megatron.training.manifest import MANIFEST, find_damage

_AGAIN = "export the checkpoint again with `ttt-megatron export`"


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model with its tokenizer.

    name: what requests call it. bos_id: what opens a document, if anything. ends: ids at which an
    answer is over. initial: the fast weights every session starts from; none without inner steps.
    """

    name: str
    model: TTTE2EForCausalLM
    tokenizer: PreTrainedTokenizerFast
    bos_id: int | None
    ends: frozenset[int]
    learns: bool
    initial: list[Tensor]

    @property
    def chunk_size(self) -> int:
        """Tokens between two inner steps."""
        return int(self.model.config.inner["chunk_size"])

    @property
    def vocab_size(self) -> int:
        """Ids that can be generated: those the tokenizer has a text for."""
        return min(len(self.tokenizer), self.model.config.vocab_size)

    def new_cache(self) -> TTTE2ECache:
        """A cache of one row that has read nothing."""
        cache = TTTE2ECache(self.model.config, 1, ttt=self.learns)
        cache.begin_learning(self.initial)
        return cache

    def at_rest(self, cache: TTTE2ECache) -> TTTE2ECache:
        """The same state in a cache that looks as one read from a file does, bit for bit.

        So a session goes on in the same way wherever it was in between, and holds no memory
        beyond what its own length needs.
        """
        state = cache.state(0, self.initial)
        return TTTE2ECache.from_state(self.model.config, state, self.model.device)

    def drift(self, cache: TTTE2ECache) -> float:
        """How far the fast weights of a cache of one row moved, ‖W − W₀‖/‖W₀‖."""
        moved = sum(
            float((now[0] - start).double().square().sum())
            for now, start in zip(cache.fast, self.initial, strict=bool(cache.fast))
        )
        size = sum(float(start.double().square().sum()) for start in self.initial)
        return (moved / size) ** 0.5 if size else 0.0

    def logits(self, cache: TTTE2ECache) -> Tensor:
        """Scores of what follows the text in a cache of one row, [V] on the CPU."""
        assert cache.last_hidden is not None
        with torch.no_grad():
            scores: Tensor = self.model.lm_head(cache.last_hidden)[0].cpu()
        return scores

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with nothing added at either end; from any thread."""
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def chat_prompt(self, messages: list[dict[str, str]]) -> str:
        """The text a chat is for this model; RequestError 400 if it knows no chats."""
        if not self.tokenizer.chat_template:
            raise RequestError(
                400,
                f"{self.name!r} has no chat template, it only continues texts: POST the text to "
                "/v1/completions",
            )
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            )
        # A template is a program of the model's author, which refuses what it does not know.
        except Exception as error:
            raise RequestError(
                400, f"messages do not fit the chat template: {error}", field="messages"
            ) from None
        return text.removeprefix(str(self.tokenizer.bos_token or ""))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out; from any thread."""
        return str(self.tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=True))


def load_served_model(
    folder: str | Path,
    *,
    name: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    inner_steps: bool = True,
) -> ServedModel:
    """Load what `ttt-megatron export` wrote; no code in the folder is run.

    dtype: auto is the one the export has. UserError if it is no export, or damaged, or there is
    no such device.
    """
    path = Path(folder)
    _check_folder(path)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; use --device cpu")
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    logging.disable_progress_bar()
    try:
        loaded: Any = TTTE2EForCausalLM.from_pretrained(
            path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            local_files_only=True,
        )
        model, info = loaded
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    # Whatever a damaged file makes the libraries raise, it is the folder that has to be mended.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be loaded ({reason[:300]}): {_AGAIN}") from None
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise UserError(f"{path}: its weights do not fit its config.json ({wrong[0]}): {_AGAIN}")
    _fix_settings(tokenizer)
    model = model.to(chosen).eval()
    learns = inner_steps and model.config.learns
    return ServedModel(
        name=name or path.resolve().name,
        model=model,
        tokenizer=tokenizer,
        bos_id=_first(model.config.bos_token_id, tokenizer.bos_token_id),
        ends=_ends(model, tokenizer),
        learns=learns,
        initial=model.initial_fast_weights() if learns else [],
    )


def _check_folder(path: Path) -> None:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}/config.json cannot be read ({error.strerror}): give a folder that "
            "`ttt-megatron export` wrote"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}/config.json is damaged ({error}): {_AGAIN}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "ttt_e2e":
        raise UserError(
            f"{path} holds a model of type {kind!r}, and only ttt_e2e is served: give a folder "
            "that `ttt-megatron export` wrote"
        )
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"{path} has no tokenizer.json: {_AGAIN}")
    if (path / MANIFEST).is_file() and (damage := find_damage(path)) is not None:
        raise UserError(f"{path} is damaged ({damage}): {_AGAIN}")


def _fix_settings(tokenizer: PreTrainedTokenizerFast) -> None:
    """Set once what the tokenizer's own methods set at every call, which threads do not survive."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(tokenizer.split_special_tokens)


def _first(*values: Any) -> int | None:
    return next((value for value in values if value is not None), None)


def _ends(model: TTTE2EForCausalLM, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """BOS opens another document, so it ends an answer like EOS does."""
    found: set[Any] = set()
    sources = (model.config, model.generation_config, tokenizer)
    for source in sources:
        for key in ("bos_token_id", "eos_token_id"):
            value = getattr(source, key, None)
            found.update(value if isinstance(value, list) else [value])
    return frozenset(int(value) for value in found if value is not None)
