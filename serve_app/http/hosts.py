"""Host names and addresses, for the service and for its clients."""

import ipaddress


def host_of(header: str) -> str:
    """The name or address in a Host header, in lower case, without port, brackets and trailing dot."""
    name = header.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] or name
    return name.removesuffix(".")


def is_loopback(name: str) -> bool:
    """Whether a name or address always refers to this machine."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
