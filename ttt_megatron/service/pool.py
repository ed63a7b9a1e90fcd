"""All sessions, in memory as far as there is room, else in their files.

Only the model's thread changes anything here; other threads may look.
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path

from ttt_megatron.hf.cache_ttt_e2e import TTTE2ECache
from ttt_megatron.service.errors import RequestError
from ttt_megatron.service.served_model import ServedModel
from ttt_megatron.service.session import Session
from ttt_megatron.service.session_store import SessionStore
from ttt_megatron.service.state_files import found_session, load_state_file, writing


class SessionPool:
    """Sessions by name; the least recently used go to disk first.

    bytes_in_use: what rows being answered may take, which the model's thread keeps up to date.
    moved: told of each `eviction` and `load`.
    """

    def __init__(
        self,
        served: ServedModel,
        limit: int,
        store: SessionStore | None,
        moved: Callable[[str], None] = lambda kind: None,
    ) -> None:
        self._served = served
        self._limit = limit
        self._store = store
        self._moved = moved
        self._sessions: dict[str, Session] = {}
        self._turns = itertools.count(1)
        self.bytes_in_use = 0
        if store is not None:
            found = [found_session(served, store, name) for name in store.names()]
            for session in sorted(found, key=lambda session: session.last_used):
                session.turn = next(self._turns)
                self._sessions[session.name] = session

    # For every thread.

    def all(self) -> list[Session]:
        """Every session, by name."""
        return sorted(self._sessions.copy().values(), key=lambda session: session.name)

    def find(self, name: str) -> Session | None:
        """The session of this name, if there is one."""
        return self._sessions.get(name)

    # For the model's thread.

    def existing(self, name: str) -> Session:
        """The session of this name; RequestError 404 if there is none."""
        session = self.find(name)
        if session is None:
            raise RequestError(404, f"there is no session {name!r}: GET /v1/sessions lists them")
        return session

    def begin(self, name: str) -> Session:
        """A session that has read nothing, in use."""
        self._refuse_taken(name)
        session = Session(name=name, in_use=True, unsaved=True)
        self._sessions[name] = session
        return session

    def take(self, session: Session) -> TTTE2ECache:
        """A session's state to go on with; it is in use until `rest`, `fail` or `remove`.

        Raises RequestError 409 for one that cannot be used.
        """
        if session.refused is not None:
            raise RequestError(409, session.refused)
        cache = session.cache if session.cache is not None else self._load(session)
        session.cache, session.in_use = None, True
        return cache

    def rest(self, session: Session, cache: TTTE2ECache) -> None:
        """Keep what a session has become."""
        steps = cache.steps[0]
        session.in_use = False
        session.cache = self._served.at_rest(cache)
        session.unsaved = session.unsaved or cache.positions[0] != session.position
        if steps != session.drift_steps:
            session.drift, session.drift_steps = self._served.drift(session.cache), steps
        session.position, session.steps = cache.positions[0], steps
        session.last_used, session.turn = time.time(), next(self._turns)

    def fail(self, session: Session, reason: str) -> None:
        """A session whose state is lost or of no use; its file stays as it is."""
        session.cache, session.in_use, session.unsaved = None, False, False
        session.refused = (
            f"session {session.name!r} failed at position {session.position:,} ({reason}): DELETE "
            "it"
        )
        if session.file_bytes:
            session.refused += ", or start the service again to go on from its file"

    def discard(self, session: Session) -> None:
        """Forget a session; its file stays."""
        self._sessions.pop(session.name, None)

    def remove(self, name: str) -> None:
        """Forget a session and remove its file."""
        session = self.existing(name)
        if self._store is not None:
            writing(name, self._store.remove)
        self.discard(session)

    def clone(self, name: str, to: str) -> Session:
        """A session `to` in the state of `name`."""
        source = self.existing(name)
        self._refuse_taken(to)
        if source.refused is not None:
            raise RequestError(409, source.refused)
        twin = Session(name=to, position=source.position, steps=source.steps)
        twin.drift, twin.drift_steps = source.drift, source.drift_steps
        if source.cache is None and self._store is not None:
            store = self._store
            writing(to, lambda target: store.copy(name, target))
            twin.file_bytes = source.file_bytes
        elif source.cache is not None:
            self.require_room(source.memory_bytes, source)
            twin.cache, twin.unsaved = source.cache.clone(), True
        self._sessions[to], twin.turn = twin, next(self._turns)
        return twin

    def begin_from_file(self, name: str, path: Path) -> Session:
        """A session that goes on from a file of an adapted state."""
        self._refuse_taken(name)
        cache = load_state_file(self._served, path)
        self.require_room(cache.nbytes, None)
        session = Session(name=name, unsaved=True)
        self.rest(session, cache)
        self._sessions[name] = session
        return session

    def make_room(self, more: int, keep: Session | None) -> bool:
        """Whether `more` bytes fit beside what is in use, once idle sessions but `keep` are out.

        Sends away as few as that needs. RequestError 507 if one cannot be written.
        """
        idle = [s for s in self._sessions.values() if s.cache is not None and s is not keep]
        held = sum(session.memory_bytes for session in idle)
        least = self.bytes_in_use + more + (held if self._store is None else 0)
        if least > self._limit:
            return False
        for session in sorted(idle, key=lambda session: session.turn):
            if held + self.bytes_in_use + more <= self._limit:
                break
            held -= session.memory_bytes
            self._evict(session)
        return True

    def require_room(self, more: int, keep: Session | None) -> None:
        """`make_room`, or RequestError 503."""
        kept = 0 if keep is None else keep.memory_bytes
        if not self.make_room(more + kept, keep):
            raise self.no_room(more)

    def no_room(self, needed: int) -> RequestError:
        """What to tell whom there is no memory for."""
        return RequestError(
            503,
            f"no room for {needed:,} bytes of state: of --memory {self._limit:,} bytes "
            f"{self.bytes_in_use:,} are in use; try again later, or start the service with more",
            retry_after=5,
        )

    def save(self, session: Session) -> None:
        """Write an idle session's file, if it has gone on since; RequestError 507 if that fails.

        The session stays in memory either way.
        """
        if self._store is None or session.cache is None or not session.unsaved:
            return
        path, cache = self._store.path(session.name), session.cache
        writing(session.name, lambda _: cache.save(path, self._served.model))
        session.unsaved, session.file_bytes = False, path.stat().st_size

    def save_all(self) -> list[str]:
        """Write every session that has gone on; returns what could not be written, and why."""
        problems = []
        for session in self.all():
            try:
                self.save(session)
            except RequestError as error:
                problems.append(error.message)
        return problems

    def _evict(self, session: Session) -> None:
        self.save(session)
        session.cache = None
        self._moved("eviction")

    def _load(self, session: Session) -> TTTE2ECache:
        assert self._store is not None
        cache = load_state_file(self._served, self._store.path(session.name))
        self._moved("load")
        return cache

    def _refuse_taken(self, name: str) -> None:
        if name in self._sessions:
            raise RequestError(409, f"there is a session {name!r} already: DELETE it first")
