"""A simulated step as a picture: one lane a worker, phases in colours."""

from pathlib import Path

from ttt_megatron.planning.simulator import Timeline

COLOURS = {
    "prefix_forward": "#9ecae1",
    "suffix_forward": "#3182bd",
    "recompute": "#bcbddc",
    "suffix_backward": "#e6550d",
    "suffix_weights": "#fdd0a2",
    "prefix_backward": "#74c476",
    "prefix_weights": "#c7e9c0",
}


def draw_timeline(timeline: Timeline, path: Path, title: str, ranks_a_stage: int = 1) -> None:
    """Writes a PNG: time to the right, one lane a worker; gaps are waits.

    `ranks_a_stage` context-parallel ranks make one pipeline stage; lanes are named after both.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    height = 1.6 + 0.35 * timeline.workers
    figure, axes = pyplot.subplots(figsize=(12, height), layout="constrained")
    phases = [phase for phase in COLOURS if any(t.phase == phase for t in timeline.tasks)]
    for phase in phases:
        for worker in range(timeline.workers):
            tasks = [t for t in timeline.tasks if t.phase == phase and t.worker == worker]
            spans = [(t.start, t.seconds) for t in tasks if t.seconds > 0]
            edge = "white" if len(tasks) <= 64 else "none"
            axes.broken_barh(
                spans, (worker - 0.42, 0.84), facecolors=COLOURS[phase], edgecolor=edge, lw=0.4
            )
    axes.set_yticks(range(timeline.workers))
    axes.set_yticklabels(
        [_lane(w, ranks_a_stage, timeline.workers) for w in range(timeline.workers)]
    )
    axes.invert_yaxis()
    axes.set(xlabel="seconds", title=title, xlim=(0, timeline.seconds))
    figure.legend(
        handles=[Patch(color=COLOURS[phase], label=phase.replace("_", " ")) for phase in phases],
        loc="outside lower center",
        ncols=len(phases),
        frameon=False,
    )
    beside = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(beside, dpi=120)
    pyplot.close(figure)
    beside.replace(path)


def _lane(worker: int, ranks_a_stage: int, workers: int) -> str:
    stage, rank = divmod(worker, ranks_a_stage)
    names = [f"stage {stage}"] if workers > ranks_a_stage else []
    names += [f"rank {rank}"] if ranks_a_stage > 1 else []
    return ", ".join(names) or "replica"
