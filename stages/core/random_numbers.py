"""Random numbers that are a function of their counter alone: splitmix64.

Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. Unlike a generator that advances,
it gives a position the same numbers whatever was drawn before it, in whichever process.
"""

import numpy as np
import numpy.typing as npt

Uint64 = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, splitmix64's increment
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_MULTIPLY_1, _MULTIPLY_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(values: Uint64) -> Uint64:
    """splitmix64's output function, elementwise: a bijection of uint64 that scatters neighbours."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> _SHIFT_1)) * _MULTIPLY_1
        values = (values ^ (values >> _SHIFT_2)) * _MULTIPLY_2
    return values ^ (values >> _SHIFT_3)


def random_uint64(seed: int, stream: int, counters: npt.ArrayLike, num_draws: int) -> Uint64:
    """Random numbers [len(counters), num_draws]; row i depends only on (seed, stream, counters[i])."""
    return random_uint64_at(seed, stream, np.asarray(counters, np.uint64)[:, None], np.arange(num_draws))


def random_uint64_at(seed: int, stream: int, counters: npt.ArrayLike, draws: npt.ArrayLike) -> Uint64:
    """Those of the numbers of `random_uint64` in the rows of `counters` and the columns `draws`, broadcast together."""
    key = mix(mix(np.array(seed, np.uint64)) + np.array(stream, np.uint64))
    with np.errstate(over="ignore"):
        keys = mix(key + _GAMMA + np.asarray(counters, np.uint64))
        return mix(keys + _GAMMA * (np.asarray(draws, np.uint64) + np.uint64(1)))
