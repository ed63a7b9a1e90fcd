"""Passes run as programs, through buffers that never move, against passes called as they are.

What a CUDA graph would repeat is run anew here, but with the same copies, sums and addresses.
"""

import gc
from pathlib import Path

import pytest
import torch
from check_golden import relative_error
from golden import build_learner, read_golden, to_ours
from meta_case import batch, engine_gradients, gradients, learner, oracle_gradients, worst_error

from ttt_kernels import WeightGradients, putting_off
from ttt_megatron.meta.chunk_graph import ChunkPrograms

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = {
    "two suffix blocks": {},
    "one suffix block": {"num_suffix_layers": 1},
    "grouped queries, untied head": {"num_kv_heads": 2, "tie_embeddings": False},
    "full attention": {"window_size": None},
}
INNER_LOOPS = {
    "some steps clipped": {},
    "no clip": {"clip": 0.0, "lr": 0.5},
    "first order": {"mode": "first_order"},
    "save_activations": {"memory_policy": "save_activations"},
    "save_all": {"memory_policy": "save_all"},
    "two levels": {"two_level": True},
    "two levels, save_all": {"two_level": True, "memory_policy": "save_all"},
}


def with_programs(**settings):
    """The learner whose passes are programs."""
    model = learner(**settings)
    model.runner = ChunkPrograms()
    return model


def assert_equal_gradients(model, direct, data=None, bound=1e-12):
    """Meta-gradients of both, from the same data."""
    data = data or batch()
    found = engine_gradients(model, data)
    assert worst_error(found, engine_gradients(direct, data)) < bound


@pytest.mark.parametrize("case", MODELS)
def test_models(case):
    model = with_programs(model=MODELS[case])
    assert_equal_gradients(model, learner(model=MODELS[case]))
    assert model.runner.made >= 2


@pytest.mark.parametrize("case", INNER_LOOPS)
def test_inner_loops(case):
    model = with_programs(inner=INNER_LOOPS[case])
    assert_equal_gradients(model, learner(inner=INNER_LOOPS[case]))
    _, expected = oracle_gradients(learner(inner=INNER_LOOPS[case]), batch())
    assert worst_error(engine_gradients(model, batch()), expected) < 1e-10


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_golden_meta_gradients(name):
    golden = read_golden(GOLDEN / f"{name}.npz")
    model = build_learner(golden, torch.float64, memory_policy="save_all")
    model.runner = ChunkPrograms()
    output = model(*golden.batch(), golden.inner_lr)
    assert relative_error(output.loss.detach(), golden.tensor("loss")) < 1e-10
    output.loss.backward()
    stored = {k[2:]: golden.tensor(k) for k in golden.arrays if k.startswith("g/")}
    found = {name.removeprefix("model."): g for name, g in gradients(model).items()}
    assert model.runner.made > 0
    assert all(relative_error(found[n], g) < 1e-10 for n, g in to_ours(stored, model).items())


def test_one_program_serves_chunks_micro_batches_and_steps():
    """Weights change in place and the inner rate by schedule; no program is made again."""
    model, direct = with_programs(inner={"clip": 0.0}), learner(inner={"clip": 0.0})
    made = []
    for step, rate in enumerate((0.1, 0.7)):
        for _ in range(2):
            data = batch(seed=7 * step + len(made))
            (model(*data, rate).loss * 0.5).backward()
            (direct(*data, rate).loss * 0.5).backward()
            made.append(model.runner.made)
        found, expected = gradients(model), gradients(direct)
        assert worst_error(found, expected) < 1e-12
        with torch.no_grad():
            for one in (model, direct):
                for name, parameter in one.named_parameters():
                    parameter.sub_(expected[name], alpha=0.01)
    # Six chunks of 4 tokens, of which a window of 7 shows nothing, 4, then 6 tokens before: three
    # programs forwards and, of the five followed by a step, three backwards.
    assert made == [6] * 4


def test_gradients_and_reports_outlive_the_next_step():
    """Nothing that is handed out lies where the next run of a program writes."""
    model = with_programs(inner={"memory_policy": "save_all"})
    output = model(*batch())
    output.loss.backward()
    held = [output.inner_grad_norms, output.token_nll]
    held += [parameter.grad for parameter in model.parameters()]
    copies = [x.clone() for x in held]
    for parameter in model.parameters():
        parameter.grad = None
    model(*batch(seed=6)).loss.backward()
    assert all(torch.equal(x, copy) for x, copy in zip(held, copies, strict=True))


def test_forward_passes_in_between_do_not_touch_a_step_under_way():
    """As in a pipeline, where a rank reads several micro-batches before it goes back."""
    model, direct = with_programs(), learner()
    first, second = (model(*batch(seed=seed)).loss for seed in (5, 6))
    for loss, seed in ((first, 5), (second, 6)):
        loss.backward()
        expected = engine_gradients(direct, batch(seed=seed))
        assert worst_error(gradients(model), expected) < 1e-12


def test_other_shapes_get_programs_of_their_own():
    model, direct = with_programs(), learner()
    for length, size in ((24, 3), (24, 2), (22, 2), (8, 1)):
        assert_equal_gradients(model, direct, batch(length, size))


def test_weights_that_moved_are_found_again():
    model, direct = with_programs(), learner()
    assert_equal_gradients(model, direct)
    made = model.runner.made
    for one in (model, direct):
        for parameter in one.parameters():
            parameter.data = parameter.data * 1.5
    gc.collect()
    assert_equal_gradients(model, direct)
    assert model.runner.made == 2 * made


def test_a_pass_leaves_what_it_is_given_as_it_was():
    """A graph is run several times on the same buffers before it is captured."""
    seen = []

    class Watching(ChunkPrograms):
        def run(self, function, plan, given, slow):
            found = super().run(function, plan, given, slow)
            for program in self._programs.values():
                before = [x.clone() for x in self._inputs._made.values()]
                outputs = [x.clone() for x in self._outputs._made.values()]
                totals = [x.clone() for x in self._totals]
                program.run()
                after = self._inputs._made.values()
                seen.append(all(map(torch.equal, before, after)))
                written = [*self._outputs._made.values(), *self._totals]
                for buffer, value in zip(written, [*outputs, *totals], strict=True):
                    buffer.copy_(value)
            return found

    model = learner(inner={"memory_policy": "save_all"})
    model.runner = Watching()
    assert_equal_gradients(model, learner(inner={"memory_policy": "save_all"}))
    assert seen
    assert all(seen)


def test_gradients_that_are_put_off_are_refused():
    with putting_off(WeightGradients()), pytest.raises(ValueError, match="put off"):
        with_programs()(*batch())


def test_bfloat16():
    settings = {"dtype": torch.float32, "compute_dtype": torch.bfloat16}
    inner = {"lr": 0.05, "memory_policy": "save_all"}
    model, direct = with_programs(inner=inner, **settings), learner(inner=inner, **settings)
    assert_equal_gradients(model, direct, bound=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["recompute", "save_activations", "save_all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_captured_graphs_equal_what_they_were_captured_from(policy, dtype):
    """Over steps with changed weights and another inner rate."""
    inner = {"memory_policy": policy}
    model, direct = (learner(inner=inner, dtype=dtype).cuda() for _ in range(2))
    model.runner = ChunkPrograms()
    made = []
    for step, rate in enumerate((0.1, 0.7)):
        data = tuple(x.cuda() for x in batch(seed=step))
        for one in (model, direct):
            one(*data, rate).loss.backward()
        found, expected = gradients(model), gradients(direct)
        assert worst_error(found, expected) < (1e-12 if dtype == torch.float64 else 1e-4)
        made.append(model.runner.made)
        with torch.no_grad():
            for one in (model, direct):
                for name, parameter in one.named_parameters():
                    parameter.sub_(expected[name], alpha=0.01)
    assert made == [6, 6]
