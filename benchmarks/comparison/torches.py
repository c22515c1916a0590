"""torch and FBGEMM: tables in memory, one training step per call."""

import os
from pathlib import Path

import numpy as np

from benchmarks.common import DIM, LEARNING_RATE


class TorchAdam:
    """`nn.Embedding(sparse=True)` with `SparseAdam`: forward, backward, step."""

    name = "torch SparseAdam in RAM"

    def __init__(self, array):
        import torch

        self.torch = torch
        self.table = torch.nn.Embedding.from_pretrained(torch.from_numpy(array), freeze=False, sparse=True)
        self.optimizer = torch.optim.SparseAdam(self.table.parameters(), lr=LEARNING_RATE)

    def step(self, batch):
        ids, grads = batch
        rows = self.table(self.torch.from_numpy(ids))
        rows.backward(self.torch.from_numpy(grads))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return rows.detach()

    def make_state(self):
        """Create the optimizer's state, as before the first step."""
        for weight in self.table.parameters():
            moments = {name: self.torch.zeros_like(weight.detach()) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[weight] = {"step": 0, **moments}

    def save(self, path):
        """Save table and optimizer durably, as a job would that must survive: in a new file, synced, then renamed."""
        half = Path(f"{path}.half")
        with half.open("wb") as file:
            self.torch.save(
                {"table": self.table.state_dict(), "optimizer": self.optimizer.state_dict()}, file
            )
            file.flush()
            os.fsync(file.fileno())
        half.rename(path)

    @classmethod
    def load(cls, path):
        """Load what `save` has written; its tensors are used as they are, without a further copy."""
        import torch

        saved = torch.load(path)
        peer = cls(saved["table"]["weight"].numpy())
        peer.optimizer.load_state_dict(saved["optimizer"])
        return peer

    def rows(self, ids):
        return self.table.weight.detach()[self.torch.from_numpy(ids)].numpy()


class TorchBagAdam(TorchAdam):
    """`nn.EmbeddingBag(sparse=True)` with `SparseAdam`."""

    name = "torch EmbeddingBag, SparseAdam in RAM"

    def step(self, batch):
        ids, offsets, grads = (self.torch.from_numpy(each) for each in batch)
        bags = self.torch.nn.functional.embedding_bag(
            ids, self.table.weight, offsets, mode="sum", sparse=True
        )
        bags.backward(grads)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return bags.detach()


class FbgemmAdagrad:
    """FBGEMM's fused kernel for CPUs: exact row-wise Adagrad within the backward pass."""

    name = "FBGEMM row-wise Adagrad in RAM"
    pooling = "NONE"

    def __init__(self, array):
        import fbgemm_gpu  # noqa: F401 - loads its operators
        import torch
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            EmbeddingLocation,
            PoolingMode,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        self.torch = torch
        self.table = SplitTableBatchedEmbeddingBagsCodegen(
            [(*array.shape, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=LEARNING_RATE,
            eps=1e-8,
            pooling_mode=PoolingMode[self.pooling],
        )
        self.weights = self.table.split_embedding_weights()[0]
        self.weights.copy_(torch.from_numpy(array))

    def step(self, batch):
        ids, grads = batch
        rows = self.table(self.torch.from_numpy(ids), self.torch.arange(ids.size + 1))
        rows.backward(self.torch.from_numpy(grads))
        return rows.detach()

    def rows(self, ids):
        return self.weights[self.torch.from_numpy(ids)].numpy()


class FbgemmBagAdagrad(FbgemmAdagrad):
    """The same kernel for sums of bags."""

    name = "FBGEMM row-wise Adagrad on bags in RAM"
    pooling = "SUM"

    def step(self, batch):
        ids, offsets, grads = batch
        bounds = self.torch.from_numpy(np.append(offsets, ids.size))
        bags = self.table(self.torch.from_numpy(ids), bounds)
        bags.backward(self.torch.from_numpy(grads))
        return bags.detach()


def embedding_bag(array, mode):
    """Make torch's lookup of bags on an array in memory; bags are ids, offsets, and weights or None."""
    import torch

    table = torch.from_numpy(array)

    def pooled(bags):
        ids, offsets, weights = (None if each is None else torch.from_numpy(each) for each in bags)
        given = torch.nn.functional.embedding_bag(ids, table, offsets, mode=mode, per_sample_weights=weights)
        return given.numpy()

    return pooled


def embedding(array, out):
    """Make the lookups of torch on an array in memory: into new memory, and into an existing array."""
    import torch

    table, target = torch.from_numpy(array), torch.from_numpy(out)

    def into(ids):
        return torch.index_select(table, 0, torch.from_numpy(ids), out=target).numpy()

    def fresh(ids):
        return torch.nn.functional.embedding(torch.from_numpy(ids), table).numpy()

    return fresh, into


def numpy_rowwise_adagrad(weights, sums, ids, grads):
    """Take the step as users would write it, on any two arrays; return the rows before the step."""
    rows = weights[ids]
    unique, inverse = np.unique(ids, return_inverse=True)
    summed = np.zeros((unique.size, DIM), np.float32)
    np.add.at(summed, inverse, grads)
    sums[unique] += (summed * summed).mean(axis=1)
    weights[unique] -= np.float32(LEARNING_RATE) / (np.sqrt(sums[unique]) + 1e-8)[:, None] * summed
    return rows
