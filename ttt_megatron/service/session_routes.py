"""The routes of named sessions."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter

from ttt_megatron.service.errors import RequestError
from ttt_megatron.service.schemas import CloneRequest, NewSession
from ttt_megatron.service.service import Service
from ttt_megatron.service.session import checked_name


def session_routes(service: Service) -> APIRouter:
    """Listing, starting, copying and removing sessions."""
    router = APIRouter(prefix="/v1/sessions")
    pool = service.pool

    @router.get("")
    async def sessions() -> dict[str, Any]:
        return {"object": "list", "data": [session.describe() for session in pool.all()]}

    @router.post("", status_code=201)
    async def begin(body: NewSession) -> dict[str, Any]:
        name = checked_name(body.name, "name")
        path = _state_file(service.options.states_dir, body.state)
        session = await service.operate({name}, lambda: pool.begin_from_file(name, path))
        told: dict[str, Any] = session.describe()
        return told

    @router.get("/{name}")
    async def session(name: str) -> dict[str, Any]:
        return pool.existing(checked_name(name)).describe()

    @router.delete("/{name}")
    async def remove(name: str) -> dict[str, Any]:
        await service.remove(checked_name(name))
        return {"object": "session", "name": name, "deleted": True}

    @router.post("/{name}/clone", status_code=201)
    async def clone(name: str, body: CloneRequest) -> dict[str, Any]:
        source, target = checked_name(name), checked_name(body.to, "to")
        twin = await service.operate({source, target}, lambda: pool.clone(source, target))
        told: dict[str, Any] = twin.describe()
        return told

    return router


def _state_file(folder: Path | None, state: str) -> Path:
    """The file of an adapted state; RequestError unless it lies below the folder of states."""
    if folder is None:
        raise RequestError(
            403, "the service has no folder of states: start it with --states-dir", field="state"
        )
    if "\0" in state:
        raise RequestError(400, "state holds a NUL byte: give a file's path", field="state")
    path = (folder / state).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise RequestError(
            403, f"state {state!r} is not below --states-dir: give a path in there", field="state"
        )
    if not path.is_file():
        raise RequestError(404, f"state {state!r} is no file in --states-dir", field="state")
    return path
