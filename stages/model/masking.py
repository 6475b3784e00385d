"""Masks for masked language modeling that are a function of (seed, epoch, block, position) alone.

A counter-based generator gives each position its own random numbers, so that masks do not depend on batch size,
workers, processes or restarts, as they do with a generator that advances.
"""

import numpy as np
import numpy.typing as npt

from stages.core.artifacts import COUNTED, Marks, TokenIds
from stages.core.random_numbers import Uint64, random_uint64_at
from stages.model.schema import ObjectiveConfig
from stages.tokens.vocabulary import Vocabulary

# Epoch that training never reaches: evaluation's masks are the same in all runs, whatever their seed.
EVALUATION_SEED, EVALUATION_EPOCH = 0, 2**32 - 1
# mlm_probability, mask_replace_prob and random_replace_prob of evaluation: part of what masked_loss means, so that runs
# that train with other masks can be compared.
_EVALUATION_MASKING = (0.15, 0.8, 0.1)
IGNORED = -100  # label of a position that is not predicted, as torch's cross_entropy has it


def mask_blocks(
    blocks: TokenIds,
    indices: npt.ArrayLike,
    vocabulary: Vocabulary,
    config: ObjectiveConfig,
    seed: int,
    epoch: int,
    marks: Marks | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Model inputs and labels for `blocks` of token ids.

    Every text token is chosen with config.mlm_probability; a chosen one is replaced by the mask token, by a random
    token or by nothing (Devlin et al. 2019, section 3.1). Control tokens are never chosen. In evaluation's epoch the
    probabilities are constants.

    Args:
        blocks: [num_blocks, block_size] token ids.
        indices: [num_blocks] the blocks' numbers in the split.
        marks: [num_blocks, block_size]; a token that does not count is never chosen. None: all count.

    Returns:
        input_ids and labels, both [num_blocks, block_size] int64; labels hold IGNORED where nothing is predicted.
    """
    if epoch == EVALUATION_EPOCH:
        choice, mask, random = _EVALUATION_MASKING
    else:
        assert config.mlm_probability and config.mask_replace_prob is not None
        assert config.random_replace_prob is not None
        choice, mask, random = config.mlm_probability, config.mask_replace_prob, config.random_replace_prob
    input_ids = blocks.astype(np.int64)
    numbers = np.asarray(indices, np.uint64)
    # A position has three draws, of which the second and the third only matter if the first one chooses it.
    choose = random_uint64_at(seed, epoch, numbers[:, None], 3 * np.arange(blocks.shape[1]))
    rows, columns = np.nonzero(_uniform(choose) < choice)  # [num_chosen] each
    may_be_chosen = ~np.isin(blocks[rows, columns], vocabulary.control)
    if marks is not None:
        may_be_chosen &= (marks[rows, columns] & COUNTED) > 0
    rows, columns = rows[may_be_chosen], columns[may_be_chosen]
    labels = np.full_like(input_ids, IGNORED)
    labels[rows, columns] = input_ids[rows, columns]
    replace, token = (_uniform(random_uint64_at(seed, epoch, numbers[rows], 3 * columns + part)) for part in (1, 2))
    masked = replace < mask
    randomised = ~masked & (replace < mask + random)
    input_ids[rows[masked], columns[masked]] = vocabulary.special["mask_token"]
    # Not a special token, unlike the stock collator: a random <pad> would shift RoBERTa's later positions.
    ordinary = vocabulary.ordinary
    replacements = ordinary[(token[randomised] * len(ordinary)).astype(np.int64)]
    input_ids[rows[randomised], columns[randomised]] = replacements
    return input_ids, labels


def _uniform(draws: Uint64) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), the upper 53 bits of each draw."""
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53
