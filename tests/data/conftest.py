"""Small corpora and prepared folders."""

from pathlib import Path

import pytest
from random_text import make_text

from ttt_megatron.data.dataset import TokenDataset, open_dataset
from ttt_megatron.data.prepare import PrepareOptions, PrepareReport, prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 text files in two levels, from one word to 400."""
    root = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        path = root / f"part{number % 3}" / f"text{number:02d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(make_text(number, 1 + number * number // 4).encode())
    return root


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> PrepareReport:
    """The corpus at byte level, in several shards. Read only: tests that damage it take a copy."""
    output = tmp_path_factory.mktemp("prepared") / "data"
    return prepare(
        PrepareOptions(
            inputs=(str(corpus),), output=str(output), validation=0.2, shard_tokens=5000, workers=1
        )
    )


@pytest.fixture(scope="session")
def train(prepared: PrepareReport) -> TokenDataset:
    """Its training split."""
    return open_dataset(prepared.output, "train", verify=True)
