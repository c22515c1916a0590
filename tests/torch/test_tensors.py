"""Rows to a GPU and gradients back, where there is one."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import shardemb  # noqa: E402
from shardemb.torch import Embedding, Optimizer  # noqa: E402
from shardemb.torch.tensors import from_gpu, to_gpu  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")


def test_copies_are_exact_and_ordered_with_the_current_stream():
    device = torch.device("cuda", torch.cuda.current_device())
    for size in (1, 1000, 2**22):
        rows = torch.randn(size)
        there = to_gpu(rows, device, torch.float32) * 2
        assert torch.equal(from_gpu(there), rows * 2)
    half = to_gpu(rows, device, torch.bfloat16)
    assert torch.equal(half.cpu(), rows.bfloat16())
    assert torch.equal(from_gpu(half), rows.bfloat16().float())


def test_training_on_a_gpu_is_that_on_the_cpu(tmp_path):
    results = []
    for device in ("cpu", "cuda"):
        with shardemb.open(tmp_path / f"{device}.zarr") as store:
            options = {"num_embeddings": 50, "embedding_dim": 4, "optimizer": shardemb.optim.SGD(lr=0.5)}
            words = Embedding(store.create_table("t", **options))
            optimizer = Optimizer(words)
            for ids in torch.arange(60).reshape(6, 10) % 50:
                (words(ids.to(device)) + 1).square().sum().backward()
                optimizer.step()
            results.append(words.table[:])
            store.commit()
    assert np.allclose(*results, 1e-6)
