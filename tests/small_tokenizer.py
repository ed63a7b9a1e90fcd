"""A tokenizer.json of a few words, for models of a few rows."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ("sea", "whale", "ship", "harpoon", "night")


def save_tokenizer(folder: Path, ids: int = 40) -> Path:
    """Writes it into `folder`, with so many ids, BOS first; returns the file."""
    names = ["<s>", "<unk>", *WORDS]
    names += [f"word{number}" for number in range(ids - len(names))]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
