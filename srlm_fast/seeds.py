"""Seeds from names: every random choice has its own, whatever else ran before."""

import hashlib


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on the text of all parts."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
