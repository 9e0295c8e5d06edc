"""What the text of an address or a host name says: IP address, loopback, pooled host.

For: decisions by address alone, such as who may connect. Not for: DNS.

Invariant: an IPv4-mapped IPv6 address (::ffff:127.0.0.1, the form in which a dual-stack socket
reports its peers) is the same as the IPv4 address.
"""

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def address_of(host: str) -> Address | None:
    """Return the address that `host` denotes, None for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def is_pooled_host(host: str) -> bool:
    """Return whether a host name is a pooled host's: its first label ends with -pooler."""
    return host.partition(".")[0].lower().endswith("-pooler")


def is_read_only_host(host: str) -> bool:
    """Return whether a host name is a read-only host's, as Lakebase names them.

    Those of endpoints end their first label with -ro, those of instances begin with instance-ro-.
    """
    label = host.partition(".")[0].lower()
    return label.endswith("-ro") or label.startswith("instance-ro-")


def is_loopback(host: str) -> bool:
    """Return whether `host` is "localhost" or a loopback address; DNS is not queried."""
    address = address_of(host)
    return host.lower() == "localhost" if address is None else address.is_loopback
