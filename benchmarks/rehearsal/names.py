"""The headless Service: a name that stands for the addresses of all ready pods, asked for by DNS."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import dns.flags
import dns.message
import dns.rdataclass
import dns.rdatatype
import dns.rrset


class Names(asyncio.DatagramProtocol):
    """Answers each A question for one name; `addresses` is asked anew every time, as endpoints change."""

    def __init__(self, name: str, addresses: Callable[[], list[str]]) -> None:
        self._name = dns.name.from_text(name)
        self._addresses = addresses
        self._transport: asyncio.DatagramTransport | None = None
        self.asked = 0

    async def start(self, host: str) -> int:
        """Listen; returns the port."""
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=(host, 0))
        port: int = self._transport.get_extra_info("sockname")[1]
        return port

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        assert self._transport is not None
        query = dns.message.from_wire(data)
        reply = dns.message.make_response(query)
        reply.flags |= dns.flags.AA | dns.flags.RA
        (question,) = query.question
        if question.name == self._name and question.rdtype == dns.rdatatype.A:
            self.asked += 1
            if addresses := self._addresses():
                reply.answer.append(dns.rrset.from_text(question.name, 5, "IN", "A", *addresses))
        self._transport.sendto(reply.to_wire(), addr)
