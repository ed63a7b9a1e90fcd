"""A small exported model of random weights, as `ttt-megatron export` writes one."""

import json
import shutil
from pathlib import Path

import torch

import ttt_megatron.hf
from ttt_megatron.data.tokenizer import ByteTokenizer
from ttt_megatron.exchange import hf_config
from ttt_megatron.exchange.hf_tokenizer import save_hf_tokenizer
from ttt_megatron.hf.configuration_ttt_e2e import TTTE2EConfig
from ttt_megatron.hf.modeling_ttt_e2e import TTTE2EForCausalLM

BOS = 256


def tiny_config(chunk: int = 8, window: int | None = 16, **changes) -> TTTE2EConfig:
    """Three blocks, two with fast weights, over bytes and BOS."""
    values = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "bos_token_id": BOS,
        "eos_token_id": BOS,
        "ttt": {"chunk_size": chunk, "window_size": window, "num_suffix_layers": 2},
    }
    return TTTE2EConfig(**(values | changes))


def write_export(folder: Path, config: TTTE2EConfig | None = None, seed: int = 0) -> Path:
    """Write a model, its code and its tokenizer. Returns the folder."""
    torch.manual_seed(seed)
    TTTE2EForCausalLM(config or tiny_config()).save_pretrained(folder)
    save_hf_tokenizer(ByteTokenizer(), folder)
    for name in hf_config.CODE_FILES:
        shutil.copy(Path(ttt_megatron.hf.__path__[0]) / name, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": hf_config._AUTO_MAP}))
    return folder
