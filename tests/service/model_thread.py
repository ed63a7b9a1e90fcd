"""The model's thread without HTTP, for tests that look at states and logits."""

import queue
from pathlib import Path

from ttt_megatron.hf.cache_ttt_e2e import TTTE2ECache
from ttt_megatron.service.jobs import Failed, Finished, Job, Started, Text
from ttt_megatron.service.options import ServiceOptions
from ttt_megatron.service.service import Service
from ttt_megatron.serving.sampling import SamplingSettings

WAIT = 60


class Asked:
    """A job that was submitted."""

    def __init__(self, service: Service, prompt: str | list[int], **changes) -> None:
        self.events: queue.Queue = queue.Queue()
        ids = service.served.encode(prompt) if isinstance(prompt, str) else prompt
        values = {
            "max_tokens": 8,
            "sampling": SamplingSettings(temperature=0.0),
            "seed": 0,
            "stops": (),
            "session": None,
            "opening": [service.served.bos_id] if isinstance(prompt, str) else [],
        }
        self.job = Job(prompt=ids, emit=self.events.put, **(values | changes))
        service.worker.submit(self.job)

    def next(self):
        """The next event."""
        return self.events.get(timeout=WAIT)

    def result(self) -> tuple[str, Finished]:
        """Text and end; raises what it failed of."""
        text = ""
        while True:
            event = self.next()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                return text, event
            text += event.text if isinstance(event, Text) else ""

    def wait_for_text(self) -> None:
        """Until the answer has begun."""
        while not isinstance(event := self.next(), Text):
            assert isinstance(event, Started), event


def started(served, folder: Path | None = None, **options) -> Service:
    """A service that works, with its sessions in a folder."""
    service = Service(served, ServiceOptions(session_dir=folder, **options))
    service.start()
    return service


def state_of(service: Service, name: str):
    """The state of an idle session in memory."""
    cache: TTTE2ECache = service.pool.existing(name).cache
    return cache.state(0, service.served.initial)
