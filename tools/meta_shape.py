"""The model whose meta step the measuring tools run, from the command line."""

import argparse

from ttt_megatron.config.schema import ModelConfig


def add_shape(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Add the options of the model's shape, with these defaults."""
    texts = {
        "prefix": "prefix blocks",
        "suffix": "suffix blocks",
        "width": "width of the residual stream",
        "heads": "attention heads",
        "mlp": "width of both MLPs",
        "vocabulary": "rows of the embedding",
        "chunk": "tokens a chunk",
        "window": "tokens a query sees",
    }
    for name, text in texts.items():
        help_text = f"{text} (default: %(default)s)"
        parser.add_argument(f"--{name}", type=int, default=defaults[name], help=help_text)
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: 1)")


def shape_of(arguments: argparse.Namespace) -> ModelConfig:
    """The model the options describe."""
    return ModelConfig(
        vocab_size=arguments.vocabulary,
        num_layers=arguments.prefix + arguments.suffix,
        num_suffix_layers=arguments.suffix,
        hidden_size=arguments.width,
        num_heads=arguments.heads,
        ffn_hidden_size=arguments.mlp,
        window_size=arguments.window,
    )
