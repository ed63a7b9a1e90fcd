"""The stages of one training under one parent run.

A run that starts from another's weights is a stage after it. The checkpoint it starts from says
which runs led there, by keys that were made before any store was asked; the runs carry theirs as
tags. So stages find one another in the store, whoever uploads which of them first and from where.
"""

from typing import Any

from ttt_megatron.tracking.header import Header

KEY = "ttt_megatron.key"
PARENT = "mlflow.parentRunId"
_FIRST_STAGE = "ttt_megatron.first_stage"
_NOTE = "mlflow.note.content"


def find_run(client: Any, experiment: str, key: str) -> Any | None:
    """The run of that key in an experiment; the oldest, if there are several."""
    return _oldest(client, experiment, f"tags.`{KEY}` = '{key}'")


def join_family(client: Any, experiment: str, run: str, header: Header) -> str | None:
    """Puts a run, and those of its earlier stages that are there, under their common parent.

    The parent is named after the first stage and made with the second. A run that has a parent, of
    a sweep for instance, keeps it; one that starts from such a run is shown below that. Returns the
    parent's id.
    """
    parent = client.get_run(run).data.tags.get(PARENT)
    if parent is not None:
        return str(parent)
    earlier = [find_run(client, experiment, key) for key, _ in header.lineage[:-1]]
    parent = _parent(client, experiment, header)
    if parent is None and header.lineage[:-1]:
        base = earlier[-1]
        if base is not None and PARENT in base.data.tags:
            parent = base.info.run_id
        else:
            parent = _new_parent(client, experiment, header)
    if parent is None:
        return None
    client.set_tag(run, PARENT, parent)
    for stage in earlier:
        if stage is not None and PARENT not in stage.data.tags and stage.info.run_id != parent:
            client.set_tag(stage.info.run_id, PARENT, parent)
    return str(parent)


def settle_parent(client: Any, experiment: str, parent: str) -> None:
    """A parent of stages runs while one of them does."""
    if _FIRST_STAGE not in client.get_run(parent).data.tags:
        return
    stages = client.search_runs([experiment], f"tags.`{PARENT}` = '{parent}'")
    running = any(stage.info.status == "RUNNING" for stage in stages)
    if running:
        client.update_run(parent, status="RUNNING")
    else:
        client.set_terminated(parent, "FINISHED")


def _parent(client: Any, experiment: str, header: Header) -> str | None:
    first, _ = header.lineage[0]
    found = _oldest(client, experiment, f"tags.`{_FIRST_STAGE}` = '{first}'")
    return None if found is None else str(found.info.run_id)


def _new_parent(client: Any, experiment: str, header: Header) -> str:
    first, name = header.lineage[0]
    tags = {_FIRST_STAGE: first, _NOTE: f"The stages of {name}, which are the runs below."}
    made = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    # Another stage may have begun, and made one, in the same moment: the older one stays.
    parent = _parent(client, experiment, header) or made
    if parent != made:
        client.delete_run(made)
    return str(parent)


def _oldest(client: Any, experiment: str, having: str) -> Any | None:
    found = client.search_runs([experiment], having, max_results=100)
    return min(found, key=lambda run: (run.info.start_time, run.info.run_id), default=None)
