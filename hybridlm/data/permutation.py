"""A random order of any number of things, of which one is found without making the others.

The generalised Feistel cipher of Black and Rogaway (2002, "Ciphers with arbitrary finite domains", section 5): a number
below a * b is a pair of digits, each of which is shifted by a hash of the other, round by round; what falls beyond the
end is put through again.
"""

import functools
import hashlib
import math

NUM_ROUNDS = 8
MASK = 2**64 - 1


def permuted(index: int, num: int, keys: tuple[int, ...]) -> int:
    """Where `index` goes in the order of `num` things that `keys` stand for."""
    a = math.isqrt(num - 1) + 1 if num > 1 else 1
    b = -(-num // a)
    while True:
        left, right = divmod(index, b)
        for shift_left, shift_right in zip(keys[::2], keys[1::2], strict=True):
            left = (left + _mixed(right ^ shift_left)) % a
            right = (right + _mixed(left ^ shift_right)) % b
        index = left * b + right
        # a * b is less than num + a, so this is seldom more than one round.
        if index < num:
            return index


@functools.lru_cache(1024)
def keys_of(*names: int) -> tuple[int, ...]:
    """Keys that have nothing to do with those of other names."""
    digest = hashlib.blake2b(".".join(map(str, names)).encode(), digest_size=8 * NUM_ROUNDS).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def _mixed(x: int) -> int:
    """64 bits that all depend on all bits of `x` (the finaliser of SplitMix64; Steele et al., 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)
