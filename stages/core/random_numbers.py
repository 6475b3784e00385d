"""Counter-based random numbers: splitmix64.

Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. Unlike a generator with a state,
it gives a position the same numbers in every process, regardless of the numbers drawn before.
"""

import numpy as np
import numpy.typing as npt

Uint64 = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, splitmix64's increment
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_MULTIPLY_1, _MULTIPLY_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix_bits(values: Uint64) -> Uint64:
    """Apply splitmix64's output function elementwise: a bijection of uint64 that scatters neighbors."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> _SHIFT_1)) * _MULTIPLY_1
        values = (values ^ (values >> _SHIFT_2)) * _MULTIPLY_2
    return values ^ (values >> _SHIFT_3)


def draw_uint64(seed: int, stream: int, counters: npt.ArrayLike, num_draws: int) -> Uint64:
    """Return random numbers, [len(counters), num_draws] uint64; row i depends only on (seed, stream, counters[i])."""
    return draw_uint64_at(seed, stream, np.asarray(counters, np.uint64)[:, None], np.arange(num_draws))


def draw_uint64_at(seed: int, stream: int, counters: npt.ArrayLike, draws: npt.ArrayLike) -> Uint64:
    """Return the numbers of `draw_uint64` at the given counters and columns.

    Args:
        counters: counters of the rows, any shape that broadcasts with `draws`.
        draws: indices of the columns.

    Returns:
        uint64 of the broadcast shape.
    """
    key = mix_bits(mix_bits(np.array(seed, np.uint64)) + np.array(stream, np.uint64))
    with np.errstate(over="ignore"):
        keys = mix_bits(key + _GAMMA + np.asarray(counters, np.uint64))
        return mix_bits(keys + _GAMMA * (np.asarray(draws, np.uint64) + np.uint64(1)))
