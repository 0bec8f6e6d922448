"""Synthetic tasks that a run reads instead of text: their numbers, ids and lengths. Imports no JAX.

The answers of an example are the only tokens with a loss. A length is counted in the task's own unit; an example fills
a sequence up to `num_tokens` of it, and the rest is padding.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

from hybridlm.config_check import ConfigError, Node, PositiveFloat, PositiveInt, Range

TaskSource = Literal[
    "mqar",
    "parity",
    "modular_arithmetic",
    "s3",
    "s5",
    "s5_swaps",
    "addition",
    "copying",
    "selective_copying",
    "induction",
]


@dataclass(frozen=True, kw_only=True)
class Task(Node, ABC):
    """Base of the configs of synthetic tasks. Example i is a function of `seed` and i alone."""

    num_examples: Annotated[int, Range(1, 2**40)] = 2**32
    """For training, which are gone through in another order every epoch; so many that none comes twice."""
    num_validation: PositiveInt = 1024
    """Examples held out: others than those above, whatever their number."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0

    unit = "tokens"
    """What a length counts."""

    @property
    @abstractmethod
    def num_ids(self) -> int:
        """Ids from 0 on that tokens and answers have."""

    @property
    @abstractmethod
    def shortest(self) -> int:
        """The least length that an example can have."""

    def num_tokens(self, length: int) -> int:
        """Inputs of an example of this length."""
        return length

    def longest(self, seq_len: int) -> int:
        """The largest length whose examples have at most `seq_len` tokens."""
        return seq_len

    def lengths(self, seq_len: int) -> range:
        """Of training examples, one as likely as another."""
        return range(self.longest(seq_len), self.longest(seq_len) + 1)


@dataclass(frozen=True, kw_only=True)
class VariedLength(Task):
    """Base of tasks whose training examples are of all lengths up to the longest that `data.seq_len` holds."""

    min_length: PositiveInt = 1
    """The shortest, in the unit of the task."""

    @property
    def shortest(self) -> int:
        return 1

    def lengths(self, seq_len: int) -> range:
        return range(self.min_length, self.longest(seq_len) + 1)


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Multi-query associative recall: key-value pairs, then each key once more (Arora et al., 2023, arXiv:2312.04927).

    Ids below half of `vocab_size` are keys, the others values; 0 fills what lies between queries.
    """

    num_pairs: PositiveInt = 4
    min_pairs: PositiveInt | None = None
    """Examples have from so many pairs up to `num_pairs`; always `num_pairs` when absent."""
    vocab_size: PositiveInt = 128
    alpha: PositiveFloat = 0.01
    """A gap of g places before a query is drawn with p(g) ~ alpha g^(alpha - 1): small ones more often."""

    @property
    def num_ids(self) -> int:
        return self.vocab_size

    @property
    def shortest(self) -> int:
        return 4 * self.num_pairs

    def check(self) -> None:
        if self.vocab_size < 2 * self.num_pairs + 2:
            raise ConfigError(
                "vocab_size",
                f"={self.vocab_size}: half of it, but for the filler, must be at least num_pairs={self.num_pairs} "
                f"keys; raise it to {2 * self.num_pairs + 2} or more",
            )
        if self.min_pairs is not None and self.min_pairs > self.num_pairs:
            raise ConfigError("min_pairs", f"={self.min_pairs}: must be at most num_pairs={self.num_pairs}")


@dataclass(frozen=True, kw_only=True)
class Parity(VariedLength):
    """Whether the ones among the bits so far are odd in number (Grazzi et al., 2024, arXiv:2411.12537)."""

    min_length: PositiveInt = 3
    answers: Literal["every", "last"] = "every"
    """After every bit, or after the last alone, as in the paper, which takes far longer to learn."""

    @property
    def num_ids(self) -> int:
        return 2


@dataclass(frozen=True, kw_only=True)
class ModularArithmetic(VariedLength):
    """Sums, differences and products modulo a number, products first (Deletang et al., 2022, arXiv:2207.02098).

    No brackets. Ids below `modulus` are numbers, then come +, -, * and =.
    """

    min_length: PositiveInt = 2
    modulus: Annotated[int, Range(2)] = 5
    answers: Literal["every", "last"] = "last"
    """After every number the value of what has been read, or after = alone, as in the paper."""

    unit = "numbers"

    @property
    def num_ids(self) -> int:
        return self.modulus + 4

    def num_tokens(self, length: int) -> int:
        return 2 * length

    def longest(self, seq_len: int) -> int:
        return seq_len // 2


@dataclass(frozen=True, kw_only=True)
class WordProblem(VariedLength):
    """Base of the word problems of symmetric groups (Merrill et al., 2024, arXiv:2404.08819).

    An id is the place of a permutation among all in the order of a dictionary.
    """

    min_length: PositiveInt = 3

    degree = 1
    """How many things are permuted."""
    swaps_only = False
    """Inputs exchange two things, or none."""

    @property
    def num_ids(self) -> int:
        return math.factorial(self.degree)


@dataclass(frozen=True, kw_only=True)
class S3(WordProblem):
    """The product of permutations of three things, after every one (Merrill et al., 2024, arXiv:2404.08819)."""

    degree = 3


@dataclass(frozen=True, kw_only=True)
class S5(WordProblem):
    """The product of permutations of five things, after every one (Merrill et al., 2024, arXiv:2404.08819)."""

    degree = 5


@dataclass(frozen=True, kw_only=True)
class S5Swaps(WordProblem):
    """The same of permutations that exchange two of five things, or none (Grazzi et al., 2024, arXiv:2411.12537)."""

    degree = 5
    swaps_only = True


@dataclass(frozen=True, kw_only=True)
class Addition(VariedLength):
    """The sum of two numbers of equally many digits (Lee et al., 2023, arXiv:2307.03381).

    Ids: the digits, + is 10 and = is 11. A length is the digits of one number; the sum has one more.
    """

    order: Literal["reverse", "plain"] = "reverse"
    """The sum's last digit first, so that each needs only what was read, or its first digit first."""

    unit = "digits"

    @property
    def num_ids(self) -> int:
        return 12

    def num_tokens(self, length: int) -> int:
        return 3 * length + 2

    def longest(self, seq_len: int) -> int:
        return (seq_len - 2) // 3


@dataclass(frozen=True, kw_only=True)
class Copying(VariedLength):
    """A random string, a separator, and the string again (Jelassi et al., 2024, arXiv:2402.01032).

    The separator's id is `num_symbols`.
    """

    num_symbols: PositiveInt = 26

    unit = "symbols"

    @property
    def num_ids(self) -> int:
        return self.num_symbols + 1

    def num_tokens(self, length: int) -> int:
        return 2 * length

    def longest(self, seq_len: int) -> int:
        return seq_len // 2


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
    """Symbols at random places among blanks, which are then recalled in order (Gu and Dao, 2023, arXiv:2312.00752).

    Id 0 is the blank, and `vocab_size - 1` asks for the next symbol at each of the last `num_copied` tokens.
    """

    num_copied: PositiveInt = 16
    vocab_size: Annotated[int, Range(4)] = 16

    @property
    def num_ids(self) -> int:
        return self.vocab_size

    @property
    def shortest(self) -> int:
        return 2 * self.num_copied


@dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """What followed a special token the first time, when it comes again (Gu and Dao, 2023, arXiv:2312.00752).

    The special token's id is `vocab_size - 1`; all others are random.
    """

    vocab_size: Annotated[int, Range(3)] = 16

    @property
    def num_ids(self) -> int:
        return self.vocab_size

    @property
    def shortest(self) -> int:
        return 3


TASKS: dict[str, type[Task]] = {
    "mqar": MQAR,
    "parity": Parity,
    "modular_arithmetic": ModularArithmetic,
    "s3": S3,
    "s5": S5,
    "s5_swaps": S5Swaps,
    "addition": Addition,
    "copying": Copying,
    "selective_copying": SelectiveCopying,
    "induction": Induction,
}
"""By the names that `data.source` has for them."""


def task_rows() -> list[tuple[str, str]]:
    """(name, what it is) of every task."""
    return [(name, (cls.__doc__ or "").partition("\n")[0]) for name, cls in TASKS.items()]
