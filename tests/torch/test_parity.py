"""The same model, batches and optimizer with `torch.nn.Embedding` and with a table on disk give the same losses."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import shardemb  # noqa: E402
import shardemb.torch  # noqa: E402

ROWS, DIM, STEPS = 500, 8, 30


def test_embedding_trains_like_the_one_of_torch(tmp_path):
    torch.manual_seed(0)
    inner = torch.nn.Embedding(ROWS, DIM, sparse=True)
    theirs = torch.optim.SparseAdam(inner.parameters(), lr=0.01)
    with shardemb.open(tmp_path / "s.zarr") as store:
        table = store.create_table(
            "t", num_embeddings=ROWS, embedding_dim=DIM, optimizer=shardemb.optim.Adam(lr=0.01)
        )
        table.write(np.arange(ROWS), inner.weight.detach().numpy())
        outer = shardemb.torch.Embedding(table)
        ours = shardemb.torch.Optimizer(outer)
        target = torch.randn(32, DIM)
        for _ in range(STEPS):
            ids = torch.randint(ROWS, (32,))
            losses = []
            for module, optimizer in ((inner, theirs), (outer, ours)):
                optimizer.zero_grad()
                loss = ((module(ids) - target) ** 2).mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert np.abs(table[:] - inner.weight.detach().numpy()).max() < 1e-5
        store.commit()
