"""Masks for masked language modeling that depend only on (seed, epoch, block, position).

A counter-based generator computes the random numbers of each position. Unlike the masks of a sequential generator,
these do not depend on the batch size, the number of workers or processes, or restarts.
"""

import numpy as np
import numpy.typing as npt

from stages.core.artifacts import COUNTED, Marks, TokenIds
from stages.core.random_numbers import Uint64, draw_uint64_at
from stages.model.schema import ObjectiveConfig
from stages.tokens.vocabulary import Vocabulary

# The masks of evaluation are the same in all runs, whatever their seed. Training never reaches this epoch.
EVALUATION_SEED, EVALUATION_EPOCH = 0, 2**32 - 1
# mlm_probability, mask_replace_prob and random_replace_prob of evaluation. They are constants, so that masked_loss can
# be compared between runs that train with different masks.
_EVALUATION_MASKING = (0.15, 0.8, 0.1)
IGNORED = -100  # label of a position that is not predicted: the default ignore_index of torch's cross_entropy


def mask_blocks(
    blocks: TokenIds,
    indices: npt.ArrayLike,
    vocabulary: Vocabulary,
    config: ObjectiveConfig,
    seed: int,
    epoch: int,
    marks: Marks | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Mask blocks of token ids and return the inputs and labels of the model.

    Every text token is chosen with config.mlm_probability. A chosen token is replaced by the mask token, replaced by a
    random token, or left as it is (Devlin et al. 2019, section 3.1). Control tokens are never chosen. For
    EVALUATION_EPOCH the probabilities are constants.

    Args:
        blocks: [num_blocks, block_size] token ids, uint16 or uint32.
        indices: [num_blocks] integers, the indices of the blocks in the split.
        marks: [num_blocks, block_size] uint8; a token without the flag COUNTED is never chosen. None: all may be.

    Returns:
        input_ids and labels, both [num_blocks, block_size] int64; a label is IGNORED if its token is not predicted.
    """
    if epoch == EVALUATION_EPOCH:
        choice, mask, random = _EVALUATION_MASKING
    else:
        assert config.mlm_probability and config.mask_replace_prob is not None
        assert config.random_replace_prob is not None
        choice, mask, random = config.mlm_probability, config.mask_replace_prob, config.random_replace_prob
    input_ids = blocks.astype(np.int64)
    numbers = np.asarray(indices, np.uint64)
    # A position has three draws: choice, replacement and token. The last two are only computed for chosen positions.
    choose = draw_uint64_at(seed, epoch, numbers[:, None], 3 * np.arange(blocks.shape[1]))
    rows, columns = np.nonzero(_convert_to_uniform(choose) < choice)  # [num_chosen] int64 each
    may_be_chosen = ~np.isin(blocks[rows, columns], vocabulary.control_ids)
    if marks is not None:
        may_be_chosen &= (marks[rows, columns] & COUNTED) > 0
    rows, columns = rows[may_be_chosen], columns[may_be_chosen]
    labels = np.full_like(input_ids, IGNORED)  # [num_blocks, block_size] int64
    labels[rows, columns] = input_ids[rows, columns]
    # Uniform numbers, [num_chosen] float64 each. `replace` selects the kind of replacement:
    # [0, mask) the mask token, [mask, mask + random) a random token, otherwise none.
    replace, token = (
        _convert_to_uniform(draw_uint64_at(seed, epoch, numbers[rows], 3 * columns + part)) for part in (1, 2)
    )
    is_masked = replace < mask
    is_random = ~is_masked & (replace < mask + random)
    input_ids[rows[is_masked], columns[is_masked]] = vocabulary.special["mask_token"]
    # Never a special token, unlike in transformers' collator: a random <pad> would shift RoBERTa's later positions.
    ordinary = vocabulary.ordinary_ids
    replacements = ordinary[(token[is_random] * len(ordinary)).astype(np.int64)]
    input_ids[rows[is_random], columns[is_random]] = replacements
    return input_ids, labels


def _convert_to_uniform(draws: Uint64) -> npt.NDArray[np.float64]:
    """Convert uint64 draws to float64 numbers in [0, 1) of the same shape, from the upper 53 bits of each."""
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53
