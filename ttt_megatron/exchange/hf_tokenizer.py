"""A tokenizer of ours as files that `transformers` loads, giving the same ids."""

from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from ttt_megatron.data.tokenizer import BOS_TOKEN, Tokenizer
from ttt_megatron.errors import UserError

# Text on which both sides must agree: scripts, white space, emoji, what looks like a BOS.
_SAMPLES = (
    "Call me Ishmael. Some years ago—never mind how long precisely—",
    "def read(path):\n\treturn  open(path).read()\r\n\n",
    "  zwei  Leerzeichen, größer, naïve, Ελλάδα, Привет, 東京, العربية, 🙂🚀\x00\x7f",
    "<|bos|> <s> <|begin_of_text|>",
)


def save_hf_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and its companions, and the description that `load_tokenizer` reads.

    A text's ids begin with BOS, as a document's do. Raises UserError if `transformers` would
    give other ids than the model was trained with.
    """
    backend = _byte_tokenizer(tokenizer.bos_id) if tokenizer.kind == "bytes" else _copy(tokenizer)
    bos = backend.id_to_token(tokenizer.bos_id)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
    )
    tokenizer.save(folder)
    # Text that spells a special token is text: it must not forge a document's boundary.
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=bos,
        pad_token=bos,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    _compare(tokenizer, folder)


def _byte_tokenizer(bos_id: int) -> FastTokenizer:
    """Ids 0 to 255 are bytes, as the byte-level alphabet spells them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in spelled)
    spelled |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    backend = FastTokenizer(models.BPE({char: byte for byte, char in spelled.items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(BOS_TOKEN, special=True)])
    assert backend.token_to_id(BOS_TOKEN) == bos_id
    return backend


def _copy(tokenizer: Tokenizer) -> FastTokenizer:
    content = tokenizer.serialized()
    assert content is not None
    return FastTokenizer.from_str(content)


def _compare(tokenizer: Tokenizer, folder: Path) -> None:
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    for text in _SAMPLES:
        ours, theirs = tokenizer.encode_document(text).tolist(), loaded(text)["input_ids"]
        if ours != theirs:
            raise UserError(
                f"{folder}: transformers turns {text!r} into {theirs[:8]}… where the model was "
                f"trained with {ours[:8]}…: its tokenizer cannot be exported as it is"
            )
        if loaded.decode(theirs, skip_special_tokens=True) != tokenizer.decode(ours):
            raise UserError(
                f"{folder}: transformers turns the ids of {text!r} into another text than the "
                "model's tokenizer: it cannot be exported as it is"
            )
