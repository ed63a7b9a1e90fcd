"""A short training on random text, for tools that watch what its steps do."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ttt_megatron.config import RunConfig, load_recipe
from ttt_megatron.data.prepare import PrepareOptions, prepare

RECIPE = """\
model: {vocab_size: 512, num_layers: 5, num_suffix_layers: 2, hidden_size: 128, num_heads: 4,
  ffn_hidden_size: 256, window_size: 128}
inner: {chunk_size: 64}
data: {sequence_length: 2048}
training: {steps: 1, global_batch_size: 4, micro_batch_size: 1, eval_sequences: 0, device: cpu}
tracking: {mlflow: false, progress: false}
"""
"""What overrides change: 3 prefix and 2 suffix blocks, 32 chunks, 4 micro-batches a step."""


@contextmanager
def small_data() -> Iterator[Path]:
    """A folder with a recipe, `recipe.yaml`, and its data; gone on leaving."""
    with TemporaryDirectory(prefix="small-training-") as name:
        folder = Path(name)
        letters = random.Random(3).choices("abcdefghijklmnopqrstuvwxyz ", k=200_000)
        (folder / "text.txt").write_text("".join(letters))
        options = PrepareOptions(
            inputs=(str(folder / "text.txt"),), output=str(folder / "data"), validation=0, workers=1
        )
        prepare(options)
        (folder / "recipe.yaml").write_text(RECIPE)
        yield folder


def small_run(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run in a folder that `small_data` made, with `key=value` settings changed.

    Raises UserError for keys and values that a recipe cannot have.
    """
    own = (f"data.path={folder / 'data'}", f"training.output={folder / 'run'}")
    return load_recipe(folder / "recipe.yaml", [*own, *overrides])
