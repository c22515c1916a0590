"""Tables on disk in the place of `torch.nn.Embedding`, one line in the model and one in the training loop.

The user imports this module; ``import shardemb`` never loads torch.

>>> import torch
>>> import shardemb
>>> import shardemb.torch
>>> store = shardemb.open(tmp / "words.zarr")
>>> table = store.create_table("words", num_embeddings=1_000, embedding_dim=4, optimizer=shardemb.optim.SGD(lr=0.5))
>>> words = shardemb.torch.Embedding(table)
>>> optimizer = shardemb.torch.Optimizer(words)
>>> words(torch.tensor([1, 2, 1])).sum().backward()
>>> optimizer.step()
>>> table.lookup([1, 2])
array([[-1. , -1. , -1. , -1. ],
       [-0.5, -0.5, -0.5, -0.5]], dtype=float32)
>>> commit = store.commit(step=1)
>>> store.close()
"""

from shardemb.ranks.ranks import Ranks
from shardemb.torch.checkpoint import load, save
from shardemb.torch.collections import EmbeddingBagCollection, EmbeddingCollection, JaggedTensor, KeyedTensor
from shardemb.torch.conversion import from_module, from_pretrained, to_module
from shardemb.torch.embedding import Embedding
from shardemb.torch.embedding_bag import EmbeddingBag
from shardemb.torch.lookahead import Pipeline, prefetching
from shardemb.torch.optimizer import Optimizer, clip_grad_norm_

__all__ = [
    "Embedding",
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "EmbeddingCollection",
    "JaggedTensor",
    "KeyedTensor",
    "Optimizer",
    "Pipeline",
    "Ranks",
    "clip_grad_norm_",
    "from_module",
    "from_pretrained",
    "load",
    "prefetching",
    "save",
    "to_module",
]
