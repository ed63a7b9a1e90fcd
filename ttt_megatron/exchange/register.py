"""An exported model as a version in MLflow's registry of models."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ttt_megatron.errors import UserError
from ttt_megatron.exchange.export import run_folder_of
from ttt_megatron.exchange.exported import check_exported, is_exported
from ttt_megatron.tracking.state import read_tracking
from ttt_megatron.tracking.store import in_words, open_client, tracking_uri
from ttt_megatron.training.checkpoint_folder import read_config, read_info, resolve_checkpoint

_FOLDER = "exported"
# A server may need long to store a file of weights.
_SECONDS = 600
_DESCRIPTION = 5000
_HASH = re.compile(r"hash of weights and settings \| `(\w+)`")
_NO_REGISTRY = "Model Registry features are not supported"


@dataclass(frozen=True, kw_only=True)
class Registration:
    """A registered version: `name` and `version` of the model, the store, and the run it is of."""

    name: str
    version: str
    uri: str
    run_id: str


@dataclass(frozen=True, kw_only=True)
class Registry:
    """A store that has been asked and has a registry, and the run there that models belong to."""

    uri: str
    run_id: str
    client: Any

    def register(self, name: str, folder: Path) -> Registration:
        """Uploads an exported folder as artifacts of the run, and makes a version `name` of it.

        The very same model of the same run is not registered twice. Raises UserError if the store
        does not take it; what was uploaded by then stays, and is used when it is tried again.
        """
        tags = version_tags(folder)
        with _told(self.uri, f"register {folder} as {name}"):
            version = self._registered(name, tags["hash"]) or self._new(name, folder, tags)
            self.client.set_tag(self.run_id, f"registered.{name}", version)
        return Registration(name=name, version=version, uri=self.uri, run_id=self.run_id)

    def _registered(self, name: str, digest: str) -> str | None:
        for known in self.client.search_model_versions(f"run_id = '{self.run_id}'"):
            if known.name == name and known.tags.get("hash") == digest:
                return str(known.version)
        return None

    def _new(self, name: str, folder: Path, tags: dict[str, str]) -> str:
        from mlflow.exceptions import MlflowException

        # By what it holds: a folder's name may be used again for another checkpoint.
        place = f"{_FOLDER}/{tags['hash'][:16]}"
        self.client.log_artifacts(self.run_id, str(folder), place)
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self.client.create_model_version(
            name=name,
            source=f"{self.client.get_run(self.run_id).info.artifact_uri}/{place}",
            run_id=self.run_id,
            tags=tags,
            description=(folder / "README.md").read_text(encoding="utf-8")[:_DESCRIPTION],
        )
        return str(version.version)


def find_registry(source: Path, name: str) -> Registry:
    """The registry of the store that a checkpoint's run is logged to, asked before any export.

    Raises UserError for a name that MLflow does not take, a run that is not in MLflow, and a store
    that is away or has no registry.
    """
    if not name.strip() or any(sign in name for sign in "/:"):
        raise UserError(
            f"--register {name!r}: a model's name holds no / and no :, and is not empty"
        )
    checkpoint = resolve_checkpoint(source)
    run_folder, config = run_folder_of(checkpoint), read_config(checkpoint)
    tracked = read_tracking(run_folder)
    # A checkpoint that was copied without its run still says which one it was.
    run_id = tracked.get("run_id") or read_info(checkpoint).tracking_run
    if run_id is None:
        raise UserError(
            f"--register {name}: {run_folder} has no MLflow run that the model could belong to; "
            f"give it one with: ttt-megatron upload {run_folder}"
        )
    uri = tracked.get("uri") or tracking_uri(config.tracking, run_folder)
    with _told(uri, f"register {name}"):
        client = open_client(uri, timeout=_SECONDS)
        client.get_run(run_id)
        client.search_registered_models(max_results=1)
    return Registry(uri=uri, run_id=run_id, client=client)


def is_export_of(folder: Path, source: Path) -> bool:
    """Whether a folder is a whole export of this very checkpoint, so that it need not be written.

    Raises UserError if it is one and damaged.
    """
    if not is_exported(folder):
        return False
    check_exported(folder)
    exported, checkpoint = read_info(folder), read_info(resolve_checkpoint(source))
    return replace(exported, path="") == replace(checkpoint, path="")


def version_tags(folder: Path) -> dict[str, str]:
    """What a version says of its model, from the exported folder."""
    config, info = read_config(folder), read_info(folder)
    per_step = config.training.global_batch_size * config.data.sequence_length
    card = (folder / "README.md").read_text(encoding="utf-8")
    digest = _HASH.search(card)
    parameters, dtypes = 0, set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                part = weights.get_slice(key)
                parameters += math.prod(part.get_shape())
                dtypes.add(str(part.get_dtype()))
    return {
        "run": config.name,
        "step": str(info.step),
        "tokens": str(info.step * per_step),
        "parameters": str(parameters),
        "hash": "" if digest is None else digest.group(1),
        "dtype": ", ".join(sorted(dtypes)),
        "sequence_length": str(config.data.sequence_length),
        "inner_mode": config.inner.mode,
    }


@contextmanager
def _told(uri: str, doing: str) -> Iterator[None]:
    """Whatever MLflow, its store or the network raises, as UserError."""
    try:
        yield
    except Exception as error:
        if _NO_REGISTRY in str(error):
            why = (
                "has no registry of models: log the run to a database or a server that has one, or "
                "name one by MLFLOW_REGISTRY_URI"
            )
        else:
            why = (
                f"does not do it ({in_words(error)}); see that it runs and that you may write to it"
            )
        raise UserError(f"cannot {doing}: MLflow at {uri} {why}") from None
