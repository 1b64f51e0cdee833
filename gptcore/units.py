"""Format numbers for people."""


def duration(seconds: float) -> str:
    """`m:ss` or `h:mm:ss`; `?` for more than 100 days."""
    if seconds > 100 * 86400:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def count(number: float) -> str:
    """4262656 -> '4.3M'."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{suffix}"
    return str(round(number))


def gib(size: float) -> str:
    """Bytes in GiB, without the unit: 1.5e9 -> '1.4'."""
    return f"{size / 2**30:.1f}"
