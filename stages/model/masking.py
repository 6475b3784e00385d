"""Masks for masked language modeling that are a function of (seed, epoch, block, position) alone.

A counter-based generator (splitmix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014) gives each position its own random numbers, so that masks do not depend on batch size, workers, processes or
restarts, as they do with a generator that advances.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from stages.core.artifacts import TokenIds
from stages.model.schema import ObjectiveConfig
from stages.tokens.vocabulary import Vocabulary

_Uint64 = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, splitmix64's increment
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_MULTIPLY_1, _MULTIPLY_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

# Epoch that training never reaches: evaluation's masks are the same in all runs, whatever their seed.
EVALUATION_SEED, EVALUATION_EPOCH = 0, 2**32 - 1
IGNORED = -100  # label of a position that is not predicted, as torch's cross_entropy has it


def mix(values: _Uint64) -> _Uint64:
    """splitmix64's output function, elementwise: a bijection of uint64 that scatters neighbours."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> _SHIFT_1)) * _MULTIPLY_1
        values = (values ^ (values >> _SHIFT_2)) * _MULTIPLY_2
    return values ^ (values >> _SHIFT_3)


def random_uint64(seed: int, epoch: int, blocks: npt.ArrayLike, num_draws: int) -> _Uint64:
    """Random numbers [len(blocks), num_draws]; row b depends on (seed, epoch, blocks[b]) alone."""
    key = mix(mix(np.array([seed], np.uint64)) + np.array([epoch], np.uint64))
    keys = mix(key + _GAMMA + np.asarray(blocks, np.uint64))
    with np.errstate(over="ignore"):
        return mix(keys[:, None] + _GAMMA * np.arange(1, num_draws + 1, dtype=np.uint64))


def mask_blocks(
    blocks: TokenIds, indices: npt.ArrayLike, vocabulary: Vocabulary, config: ObjectiveConfig, seed: int, epoch: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Model inputs and labels for `blocks` of token ids.

    Every text token is chosen with config.mlm_probability; a chosen one is replaced by the mask token, by a random
    token or by nothing (Devlin et al. 2019, section 3.1). Control tokens are never chosen.

    Args:
        blocks: [num_blocks, block_size] token ids.
        indices: [num_blocks] the blocks' numbers in the split.

    Returns:
        input_ids and labels, both [num_blocks, block_size] int64; labels hold IGNORED where nothing is predicted.
    """
    assert config.mlm_probability and config.mask_replace_prob is not None and config.random_replace_prob is not None
    input_ids = blocks.astype(np.int64)
    draws = random_uint64(seed, epoch, indices, 3 * blocks.shape[1])
    choose, replace, token = (_uniform(draws[:, part::3]) for part in range(3))
    chosen = (choose < config.mlm_probability) & ~np.isin(blocks, vocabulary.control)
    labels = np.where(chosen, input_ids, IGNORED)
    masked = chosen & (replace < config.mask_replace_prob)
    randomised = chosen & ~masked & (replace < config.mask_replace_prob + config.random_replace_prob)
    input_ids[masked] = vocabulary.special["mask_token"]
    # Not a special token, unlike the stock collator: a random <pad> would shift RoBERTa's later positions.
    ordinary = vocabulary.ordinary
    input_ids[randomised] = ordinary[(token[randomised] * len(ordinary)).astype(np.int64)]
    return input_ids, labels


def _uniform(draws: _Uint64) -> npt.NDArray[Any]:
    """Uniform numbers in [0, 1), the upper 53 bits of each draw."""
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53
