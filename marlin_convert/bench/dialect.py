"""What a server takes of a request: fields that it refuses by name are left out, or said in another way."""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from marlin_convert.bench.events import Answer, Refused, sentence
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

    def of(self, asked: Asked, left_out: Iterable[str] = ()) -> Asked:
        """The request in words that the server knows, without some fields more."""
        kept = {
            INSTEAD[name] if name in self.refused or name in left_out else name: value
            for name, value in asked.fields.items()
        }
        return replace(asked, fields={name: value for name, value in kept.items() if name is not None})

    def refuse(self, name: str, said: str) -> None:
        """Let the field not be sent again."""
        if name not in self.refused:
            self.refused[name] = said
            log.info("%s does not take %s: %s", self.server.url, name, said)

    async def ask(self, asked: Asked, timeout: float) -> Answer:
        """Have a request answered; one that is refused for a field is sent again, its clock begins anew.

        Fields are taken for refused when a request without them is answered: what a server repeats of one
        that it refuses for another reason names fields too.
        """
        left_out: dict[str, str] = {}
        while True:
            said = self.of(asked, left_out)
            try:
                answer = await generate(self.server, said, timeout)
            except Refused as refused:
                name = named(said, refused)
                if name is None:
                    raise
                left_out[name] = refused.detail
            else:
                for name, why in left_out.items():
                    self.refuse(name, why)
                return answer


def named(asked: Asked, refused: Refused) -> str | None:
    """The field of a request that the server names first, in its sentence or else in all that it says.

    Others that it names later may be those that it knows.
    """
    for text in (sentence(refused.said), refused.said.decode("utf-8", "replace")):
        found = {name: re.search(rf"\b{name}\b", text) for name in INSTEAD if name in asked.fields}
        places = {place.start(): name for name, place in found.items() if place}
        if places:
            return places[min(places)]
    return None
