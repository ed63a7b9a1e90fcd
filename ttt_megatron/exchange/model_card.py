"""The README of an exported model."""

import math
from dataclasses import dataclass
from pathlib import Path

from ttt_megatron.evaluation.report import read_report
from ttt_megatron.exchange.verify_export import Comparison
from ttt_megatron.hf.configuration_ttt_e2e import TTTE2EConfig
from ttt_megatron.training.checkpoint_folder import CheckpointInfo

# Where `evaluate` leaves its report in a run's folder.
_EVALUATION = Path("evaluation") / "by_position.json"


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Where an exported model comes from; `tracking` as `read_tracking` gives it."""

    name: str
    run: str
    info: CheckpointInfo
    tracking: dict[str, str]
    run_folder: Path
    recipe: str
    hash: str
    dtype: str
    version: str
    parameters: int
    comparison: Comparison | None


def model_card(config: TTTE2EConfig, facts: CardFacts) -> str:
    """The card as Markdown."""
    return (
        "\n\n".join(
            [
                "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
                "tags: [ttt-e2e, test-time-training, long-context]\n---",
                f"# {facts.name}",
                _summary(config, facts),
                _usage(),
                "## Training",
                _table(_training(facts)),
                *_evaluation(facts),
                "<details><summary>The recipe, resolved</summary>\n\n"
                f"```yaml\n{facts.recipe.strip()}\n```\n\n</details>",
                "## This export",
                _table(_export(facts)),
            ]
        )
        + "\n"
    )


def _summary(config: TTTE2EConfig, facts: CardFacts) -> str:
    inner = config.inner
    window = inner["window_size"]
    reach = "full attention" if window is None else f"a window of {window:,} tokens"
    text = (
        f"A language model of {facts.parameters:,} parameters: {config.num_hidden_layers} blocks "
        f"of width {config.hidden_size:,}, {config.num_attention_heads} heads, {reach}, "
        f"{config.vocab_size:,} tokens."
    )
    if not config.learns:
        return text
    return text + (
        f" It keeps learning while it reads and writes (TTT-E2E, arXiv 2512.23675): after every "
        f"{inner['chunk_size']:,} tokens one clipped gradient step (rate {inner['inner_lr']:g}, "
        f"clip {inner['clip']:g}) on its own next-token loss moves the fast weights, an MLP in "
        f"each of the last {inner['num_suffix_layers']} blocks. What was read long ago is in the "
        "fast weights; memory does not grow with the text."
    )


def _usage() -> str:
    return """## Use

Needs torch, transformers (5.23 or newer) and safetensors.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("A document begins", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
model.generate(**inputs, ttt=False)                     # the same weights without inner steps
```

A text can be read in pieces, kept, and gone on from:

```python
cache = None
for piece in pieces:                                    # input ids [1, n]; a text opens with BOS
    cache = model(piece, cache=cache, logits_to_keep=1).cache
cache.save("book.state", model)                         # small, whatever the length
cache = type(cache).load("book.state", model)
model.generate(question_ids, cache=cache)               # only what follows
```

A cache has `clone()`, `reset()`, `select(rows)`, `reorder(rows)`, `save(path, model, row)` and
`load(path, model)`; each row of a batch learns by itself, left padding is passed over."""


def _training(facts: CardFacts) -> dict[str, str]:
    info = facts.info
    loss = f"{info.loss:.4f}" if math.isfinite(info.loss) else str(info.loss)
    return {
        "run": facts.run,
        "step": f"{info.step:,}",
        "loss of the last step": loss,
        "data fingerprint": f"`{info.data_fingerprint}`",
        "MLflow run": f"`{info.tracking_run or facts.tracking.get('run_id', 'none')}`",
    }


def _evaluation(facts: CardFacts) -> list[str]:
    """The run's evaluation by position, if there is one of this step."""
    path = facts.run_folder / _EVALUATION
    if not path.is_file():
        return []
    report = read_report(path)
    if report.about.get("step") != facts.info.step:
        return []
    return ["Held-out loss by token position, nats a token:", report.markdown().strip()]


def _export(facts: CardFacts) -> dict[str, str]:
    verified = "not verified" if facts.comparison is None else str(facts.comparison)
    return {
        "weights": facts.dtype,
        "written by": f"ttt-megatron {facts.version}",
        "hash of weights and settings": f"`{facts.hash}`",
        "verified": verified,
    }


def _table(values: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in values.items())])
