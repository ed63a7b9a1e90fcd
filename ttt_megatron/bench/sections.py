"""The groups of every section, from what is asked."""

from ttt_megatron.bench.attention_cases import attention_groups
from ttt_megatron.bench.attention_shape import AttentionShape
from ttt_megatron.bench.baselines import DTYPES
from ttt_megatron.bench.case import Group
from ttt_megatron.bench.ceilings import Ceilings
from ttt_megatron.bench.fast_weight_cases import product_group, step_group
from ttt_megatron.bench.head_cases import head_group
from ttt_megatron.bench.inner_cases import inner_group
from ttt_megatron.bench.latency_cases import latency_group
from ttt_megatron.bench.memory import available_bytes
from ttt_megatron.bench.meta_cases import meta_group
from ttt_megatron.bench.models import Size, tiny_with_all_systems
from ttt_megatron.bench.options import Options
from ttt_megatron.bench.prefix_cases import prefix_group
from ttt_megatron.bench.row_cases import row_groups
from ttt_megatron.bench.static_cases import static_group
from ttt_megatron.bench.system_groups import system_groups

# The published chunk and window, at the head dims that kernels are tuned for.
_CHUNK, _WINDOW, _HEADS = 1024, 8192, 32


def groups_of(options: Options, ceilings: Ceilings) -> list[Group]:
    """Everything that will be measured, in order."""
    found: list[Group] = []
    if "kernels" in options.sections:
        found += _kernels(options)
    common = options.device, options.step_repeats, ceilings
    if "inner" in options.sections:
        found += [
            inner_group(size, precision, *common)
            for precision in options.precisions
            for size in options.sizes
        ]
    if "meta" in options.sections:
        if len(options.precisions) > 1:
            length = min(options.lengths)
            found += [
                prefix_group(size, length, options.precisions, *common) for size in options.sizes
            ]
        available = available_bytes(options.device)
        found += [
            meta_group(size, length, precision, *common, available)
            for length in options.lengths
            for precision in options.precisions
            for size in options.sizes
        ]
    if "latency" in options.sections:
        found += [
            latency_group(size, length, precision, *common)
            for length in options.lengths
            for precision in options.precisions
            for size in options.sizes
        ]
    if "systems" in options.sections:
        sizes = (tiny_with_all_systems(),) if options.small else options.sizes
        available = available_bytes(options.device)
        found += [
            group
            for length in options.lengths
            for precision in options.precisions
            for size in sizes
            for group in system_groups(size, length, precision, *common, available)
        ]
    return found


def _kernels(options: Options) -> list[Group]:
    device, rounds = options.device, options.repeats
    found: list[Group] = []
    # With float8 products all other operations run in bf16.
    precisions = dict.fromkeys(p if p in DTYPES else "bf16" for p in options.precisions)
    for precision in precisions:
        found += attention_groups(_attention_shapes(options), precision, device, rounds)
        for size in options.sizes:
            model, tokens = size.config.model, size.config.inner.chunk_size
            width = model.hidden_size
            ffn = model.prime_ffn_hidden_size or model.ffn_hidden_size
            head = tokens, model.vocab_size or 0, width
            rows = tokens, width, model.ffn_hidden_size, model.num_heads
            found.append(head_group(*head, precision, device, rounds))
            found += row_groups(*rows, precision, device, rounds)
            found.append(product_group(tokens, width, ffn, precision, device, rounds))
            steps = model.num_suffix_layers, width, ffn
            found.append(step_group(*steps, precision, device, rounds))
    if "fp8" in options.precisions:
        for size in options.sizes:
            model, rowwise = size.config.model, size.config.fp8.scaling == "row"
            tokens = model.window_size or size.config.data.sequence_length
            columns = 2 * model.ffn_hidden_size
            shape = tokens, model.hidden_size, columns
            found.append(static_group(*shape, rowwise, device, rounds))
    places: dict[tuple[str, ...], Group] = {}
    for group in found:
        places.setdefault((group.operation, group.shape, group.precision), group)
    return list(places.values())


def _attention_shapes(options: Options) -> list[AttentionShape]:
    """Chunks behind a full window, and whole sequences: the sizes', and on a GPU the published
    window at 32 heads."""
    shapes: list[AttentionShape] = []
    if options.device.type == "cuda" and not options.small:
        for head_dim in (64, 128):
            shapes += _chunk_and_sequence(_HEADS, head_dim, _CHUNK, _WINDOW)
    else:
        for size in options.sizes:
            shapes += _of_size(size)
    return shapes


def _of_size(size: Size) -> list[AttentionShape]:
    model, chunk = size.config.model, size.config.inner.chunk_size
    window = model.window_size or size.config.data.sequence_length
    heads, head_dim = model.num_heads, model.hidden_size // model.num_heads
    return _chunk_and_sequence(heads, head_dim, chunk, window)


def _chunk_and_sequence(heads: int, head_dim: int, chunk: int, window: int) -> list[AttentionShape]:
    places = ((chunk, window - 1), (window, 0))
    return [
        AttentionShape(heads=heads, head_dim=head_dim, length=length, past=past, window=window)
        for length, past in places
    ]
