"""Which item comes when: covered, repeatable, and the same whatever the batch."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightdiff.data.order import batch_at, generator, item_noise, key, permutation
from lightdiff.errors import UserError
from lightdiff.extras.data.mixing import Mixture

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True, database=None)


@PROPERTY
@given(st.integers(1, 200), st.integers(0, 10**6), st.integers(0, 50))
def test_a_permutation_is_one(count: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(count, seed, epoch).tolist()) == list(range(count))


def test_each_epoch_and_seed_has_its_own_permutation() -> None:
    orders = {tuple(permutation(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@PROPERTY
@given(st.integers(1, 40), st.integers(0, 1000), st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_the_stream_does_not_depend_on_batch_sizes(count: int, seed: int, sizes: list[int]) -> None:
    total, stream, position = sum(sizes), [], 0
    for size in sizes:
        batch = batch_at(position, size, count, seed)
        assert len(batch) == size
        stream += batch
        position += size
    assert stream == batch_at(0, total, count, seed)
    assert stream == [batch_at(p, 1, count, seed)[0] for p in range(total)]


@PROPERTY
@given(st.integers(0, 10**9), st.integers(1, 300), st.integers(1, 100), st.integers(0, 1000))
def test_a_batch_is_that_of_its_positions_one_by_one(position: int, size: int, count: int, seed: int) -> None:
    places = [divmod(p, count) for p in range(position, position + size)]
    one_by_one = [(epoch, permutation(count, seed, epoch).tolist()[i]) for epoch, i in places]
    assert batch_at(position, size, count, seed) == one_by_one


@pytest.mark.parametrize("size", [1, 3, 7, 10, 25])
def test_each_item_comes_once_an_epoch(size: int) -> None:
    count, epochs = 7, 10
    stream = [place for p in range(0, count * epochs, size) for place in batch_at(p, size, count, seed=4)]
    for epoch in range(epochs):
        assert sorted(item for e, item in stream[: count * epochs] if e == epoch) == list(range(count))
    assert [e for e, _ in stream] == sorted(e for e, _ in stream)


def test_a_position_beyond_the_first_epoch_is_in_a_later_one() -> None:
    count, seed = 6, 3
    assert batch_at(20, 2, count, seed) == [(3, int(permutation(count, seed, 3)[i])) for i in (2, 3)]
    across = batch_at(5, 2, count, seed)
    assert across == [(0, int(permutation(count, seed, 0)[5])), (1, int(permutation(count, seed, 1)[0]))]
    assert {epoch for epoch, _ in batch_at(10**12, 6, count, seed)} <= {10**12 // 6, 10**12 // 6 + 1}


def test_keys_of_neighbours_share_nothing() -> None:
    keys = [key(seed, "noise", step) for seed in range(60) for step in range(60)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**63 for k in keys)
    # Seed s, step t + 1 is not seed s + 1, step t; and half of the 63 bits differ: 31.5, with standard error 0.07.
    differing = [(a ^ b).bit_count() for a, b in pairwise(keys)]
    assert 31.1 < sum(differing) / len(differing) < 31.9


def test_a_key_tells_its_parts_apart() -> None:
    purposes = [("a", 1), ("a1",), ("a", 1, ""), ("a", "", 1), (1, "a"), ("a",), (), ("a", 11), ("a", 1, 1)]
    assert len({key(0, *purpose) for purpose in purposes}) == len(purposes)
    assert key(1, "a") != key(11, "a") != key(1, 1, "a")


def test_a_key_is_the_same_on_every_machine_and_day() -> None:
    # SHA-256 of "0", 0x1f, "order", 0x1f, "0", by sha256sum; Python's own hash() would differ between processes
    assert key(0, "order", 0) == 0x186069097D4B4F0E >> 1


def test_a_generator_is_its_keys() -> None:
    first = torch.randn(4, generator=generator("cpu", 1, "x", 2))
    assert torch.equal(first, torch.randn(4, generator=torch.Generator().manual_seed(key(1, "x", 2))))


def test_item_noise_does_not_depend_on_the_batch() -> None:
    whole = item_noise((2, 3, 4), [5, 0, 9, 5], seed=1, purpose="start")
    assert whole.shape == (4, 2, 3, 4)
    for row, item in enumerate([5, 0, 9, 5]):
        assert torch.equal(whole[row], item_noise((2, 3, 4), [item], seed=1, purpose="start")[0])
    torch.manual_seed(7)  # nor on the global generator, which it leaves alone
    before = torch.get_rng_state()
    assert torch.equal(item_noise((2, 3, 4), [5, 0, 9, 5], seed=1, purpose="start"), whole)
    assert torch.equal(torch.get_rng_state(), before)


def test_item_noise_is_standard_normal_and_uncorrelated() -> None:
    noise = item_noise((5000,), [0, 1, 2], seed=0, purpose="start")
    noise = torch.cat([noise, item_noise((5000,), [0], seed=1, purpose="start")])
    noise = torch.cat([noise, item_noise((5000,), [0], seed=0, purpose="step 0")])
    # 5000 numbers: a correlation's standard error is 0.014, a variance's 0.02
    torch.testing.assert_close(torch.cov(noise), torch.eye(5), rtol=0, atol=0.1)
    torch.testing.assert_close(noise.mean(1), torch.zeros(5), rtol=0, atol=0.06)


def drawn(mixture: Mixture, images: int, size: int = 7) -> list[tuple[int, int]]:
    return [pair for at in range(0, images, size) for pair in mixture.batch_at(at, min(size, images - at))]


def test_a_mixture_draws_each_source_by_its_weight_and_each_item_equally() -> None:
    sources = np.array([0] * 90 + [1] * 10, np.int32)
    pairs = drawn(Mixture(sources, (1, 1), seed=3), 400)  # four epochs
    assert len(set(pairs)) == 400  # a pass and an item come once
    for epoch in range(4):
        counts = Counter(int(sources[item]) for _, item in pairs[100 * epoch : 100 * epoch + 100])
        assert counts == {0: 50, 1: 50}
    times = Counter(item for _, item in pairs)
    assert {times[item] for item in range(90)} <= {2, 3}
    assert {times[item] for item in range(90, 100)} == {20}
    counts = Counter(int(sources[item]) for _, item in drawn(Mixture(sources, (2, 1), seed=3), 300))
    assert counts == {0: 201, 1: 99}  # 67 and 33 an epoch


def test_a_mixture_is_a_function_of_the_position() -> None:
    sources, whole = np.arange(20, dtype=np.int32) % 3, []
    for start in range(0, 60, 6):
        whole += Mixture(sources, (1, 5, 0.5), seed=0).batch_at(start, 6)  # a new one each time, as after a stop
    mixture = Mixture(sources, (1, 5, 0.5), seed=0)
    assert mixture.batch_at(0, 60) == whole
    assert mixture.batch_at(17, 11) == whole[17:28]  # going back
    assert Mixture(sources, (1, 5, 0.5), seed=1).batch_at(0, 60) != whole
    with pytest.raises(UserError, match=r"the source number 2 has a weight, but no training images$"):
        Mixture(np.zeros(5, np.int32), (1, 1), seed=0)
