"""A disk that refuses a file is an OSError, whatever the library that wrote calls it."""

import errno

import numpy as np
import polars as pl
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from full_disk import files_end_at
from safetensors import SafetensorError

from recsys.candidates.nearest.static import AnnIndex
from recsys.core import disk

ROWS = 100_000


@pytest.mark.parametrize(
    "write",
    [
        lambda path: safetensors.numpy.save_file({"a": np.zeros(ROWS)}, path),
        lambda path: safetensors.torch.save_file({"a": torch.zeros(ROWS)}, path),
        lambda path: pl.DataFrame({"a": np.random.default_rng(1).random(ROWS)}).write_parquet(path),
    ],
    ids=["arrays", "tensors", "parquet"],
)
def test_a_refused_file_is_an_error_of_the_system(write, tmp_path):
    path = tmp_path / "file"
    with files_end_at(50_000), pytest.raises(OSError, match="file") as refused, disk.writing(path):
        write(path)
    assert refused.value.errno == errno.EFBIG
    with disk.writing(path):
        write(path)


def test_an_index_too(tmp_path):
    vectors = np.random.default_rng(1).standard_normal((ROWS // 10, 16)).astype(np.float32)
    index = AnnIndex.build(np.arange(len(vectors)), vectors)
    with files_end_at(50_000), pytest.raises(OSError, match=r"ann\.faiss") as refused:
        index.save(tmp_path, "run")
    assert refused.value.errno is not None
    index.save(tmp_path, "run")


def test_another_error_stays_what_it_is(tmp_path):
    (tmp_path / "file").write_bytes(b"no tensors")
    with pytest.raises(SafetensorError), disk.writing(tmp_path):
        safetensors.numpy.load_file(tmp_path / "file")
