"""Whether a text is an address, and whether only this machine reaches it.

For: what is decided by addresses alone: who may connect, who asked. Not for: asking DNS.

Invariant: an IPv4 address is the same address when it is written as an IPv6 one (::ffff:127.0.0.1,
as a socket that serves both gives its peers).
"""

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def address_of(host: str) -> Address | None:
    """Return the address that `host` is, None for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches `host`, without asking DNS: other names do not."""
    address = address_of(host)
    return host.lower() == "localhost" if address is None else address.is_loopback
