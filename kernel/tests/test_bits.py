"""Tests that patches have the bits of simplejpeg and of torch's antialiased bicubic resize."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
from images import SIZES, crop, draw_image, encode, reference, visible


def compare(kernel, seed: int, cases: int) -> int:
    """Compare random cases; return how many of them the kernel accepted."""
    random = np.random.default_rng(seed)
    accepted = 0
    for case in range(cases):
        if case % 8 == 0:  # a file serves several views
            width, height = random.integers(16, 420, 2).tolist()
            data = encode(random, draw_image(random, width, height))
        size, patch = SIZES[random.integers(len(SIZES))]
        box = crop(random, width, height, size)
        keep = visible(random, (size // patch) ** 2)
        mirrored = bool(random.random() < 0.5)
        patches = kernel.File(data).patches(box, size, patch, keep, mirrored=mirrored, verified=bool(case % 2))
        if patches is not None:
            accepted += 1
            expected = reference(data, box, size, patch, keep, mirrored)
            assert np.array_equal(patches, expected), (seed, case, width, height, box, size, patch, mirrored)
    return accepted


def test_patches_of_random_files_crops_and_masks_are_equal(kernel):
    assert compare(kernel, 1, 400) == 400


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_patches_of_20000_cases_are_equal(kernel, seed):
    assert compare(kernel, seed, 2000) == 2000


@pytest.mark.parametrize("sampling", ["444", "422", "420", "Gray"])
def test_views_of_each_size_around_a_block_are_equal(kernel, sampling):
    random = np.random.default_rng(5)
    keep = np.arange(9, dtype=np.int16)
    for width in (*range(16, 34), 47, 64):
        height = 16 + width % 19
        data = simplejpeg.encode_jpeg(draw_image(random, width, height), 80, "RGB", sampling)
        for box in ((0, 0, width, height), (1, 1, width, height), (0, 1, width - 1, height - 1)):
            assert np.array_equal(kernel.File(data).patches(box, 48, 16, keep), reference(data, box, 48, 16, keep))


@pytest.mark.parametrize("size", [(4096, 1024), (2048, 2048), (16, 4096)])
def test_largest_images_are_equal(kernel, size):
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    pixels[: size[0] // 2] //= 8
    data = simplejpeg.encode_jpeg(pixels, 60, "RGB", "444")
    box = (3, 1, size[1] - 1, size[0])
    keep = np.array([0, 3, 77, 195], np.int16)
    assert np.array_equal(kernel.File(data).patches(box, 224, 16, keep), reference(data, box, 224, 16, keep))


@pytest.mark.slow
@pytest.mark.parametrize("size", [96, 112, 160, 192, 224, 256, 288, 336, 384, 448])
def test_filter_of_each_length_is_equal(kernel, size):
    random = np.random.default_rng(size)
    data = simplejpeg.encode_jpeg(draw_image(random, 1100, 16), 90, "RGB", "444")
    patch = 16
    if size % 32 == 0:
        patch = 32
    row = size // patch
    keep = np.arange(0, row * row, row + 1, dtype=np.int16)  # the diagonal
    for width in range(1, 1101):
        box = (1100 - width, 0, 1100, 16)
        patches = kernel.File(data).patches(box, size, patch, keep)
        assert np.array_equal(patches, reference(data, box, size, patch, keep)), width


def test_threads_do_not_disturb_each_other(kernel):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda seed: compare(kernel, seed, 40), range(30, 38))) == [40] * 8


def test_result_goes_to_given_array(kernel):
    random = np.random.default_rng(2)
    data = simplejpeg.encode_jpeg(draw_image(random, 60, 50), 90)
    out = np.zeros((2, 768), np.uint8)
    assert kernel.File(memoryview(data)).patches((0, 0, 60, 50), 48, 16, np.array([1, 7], np.int16), out=out) is out
    assert np.array_equal(out, reference(data, (0, 0, 60, 50), 48, 16, np.array([1, 7])))
    for wrong in (np.zeros((3, 768), np.uint8), np.zeros((2, 768)), np.zeros((2, 1536), np.uint8)[:, ::2]):
        with pytest.raises(ValueError, match="contiguous, writable uint8 array of shape"):
            kernel.File(data).patches((0, 0, 60, 50), 48, 16, np.array([1, 7]), out=wrong)
