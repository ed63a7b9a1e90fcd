"""A whole benchmark: ceilings, sections, files."""

from collections.abc import Callable
from pathlib import Path

import torch

from ttt_megatron.bench.ceilings import measure_ceilings
from ttt_megatron.bench.environment import command_line, describe
from ttt_megatron.bench.options import Options
from ttt_megatron.bench.results import Report, Result, write_beside
from ttt_megatron.bench.runner import Runner
from ttt_megatron.bench.sections import groups_of
from ttt_megatron.bench.tables import as_markdown

STEM = "bench"


def run_benchmark(options: Options, log: Callable[[str], None]) -> Report:
    """Measures what is asked. Files are written after every group, so that what stops a run leaves
    what it found; the picture comes last. `log` takes lines of progress.

    On a CPU everything runs on one thread, whose own seconds are counted.
    """
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    if options.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        log("measuring the machine's ceilings")
        ceilings = measure_ceilings(options.device, list(options.precisions))
        report = Report(about=describe(options.device, ceilings, command_line()))
        runner = Runner(options.device, ceilings, budget=options.budget, log=log)

        def keep(results: list[Result]) -> None:
            report.results.extend(results)
            if options.output is not None:
                write(report, options.output)

        runner.run(groups_of(options, ceilings), keep)
        report.about["seconds"] = round(runner.elapsed, 1)
    finally:
        torch.set_num_threads(threads)
    if options.output is not None:
        write(report, options.output)
    return report


def write(report: Report, folder: Path) -> list[Path]:
    """The JSON and the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{STEM}.json", folder / f"{STEM}.md"]
    write_beside(files[0], report.to_json())
    write_beside(files[1], as_markdown(report))
    return files


def failures(report: Report) -> list[Result]:
    """What of ours did not run, for another reason than memory or time."""
    return [one for one in report.results if one.status == "failed"]
