"""What a server takes of a request: fields that it refuses by name are left out, or said in another way."""

import logging
import re
from dataclasses import dataclass, field, replace

from marlin_convert.bench.events import Answer, Refused
from marlin_convert.bench.stream import Asked, Server, generate

log = logging.getLogger("marlin_convert")

# Fields that not every server knows, and what is sent in their place: None is nothing.
INSTEAD = {
    "stream_options": None,
    "ignore_eos": None,
    "temperature": None,
    "max_completion_tokens": "max_tokens",
}


@dataclass
class Dialect:
    """What a server takes: the fields it has refused, with what it said, are not sent to it again."""

    server: Server
    refused: dict[str, str] = field(default_factory=dict)

    def of(self, asked: Asked) -> Asked:
        """The request in words that the server knows."""
        kept = {
            INSTEAD[name] if name in self.refused else name: value for name, value in asked.fields.items()
        }
        return replace(asked, fields={name: value for name, value in kept.items() if name is not None})

    def learn(self, asked: Asked, refused: Refused) -> bool:
        """Whether the server has refused fields of a request, by name, so that it can be asked without."""
        named = [
            name for name in INSTEAD if name in asked.fields and re.search(rf"\b{name}\b", refused.detail)
        ]
        for name in named:
            self.refuse(name, refused.detail)
        return bool(named)

    def refuse(self, name: str, said: str) -> None:
        """Let the field not be sent again."""
        if name not in self.refused:
            self.refused[name] = said
            log.info("%s does not take %s: %s", self.server.url, name, said)

    async def ask(self, asked: Asked, timeout: float) -> Answer:
        """Have a request answered; one that is refused for a field is sent again, its clock begins anew."""
        while True:
            said = self.of(asked)
            try:
                return await generate(self.server, said, timeout)
            except Refused as refused:
                if not self.learn(said, refused):
                    raise
