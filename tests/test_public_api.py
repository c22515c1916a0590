"""The names and signatures that programs are written against, and what is promised about each."""

import importlib
import importlib.metadata
import inspect
import re
from pathlib import Path

import pytest

import shardemb
from shardemb import dtypes, exports, initializers, optim, text
from shardemb.optim import schedules

NAMES = [
    "Admission",
    "Bags",
    "Commit",
    "DiskFullError",
    "EraEndedError",
    "FormatError",
    "FrozenRowError",
    "KeyedTable",
    "LearningRateError",
    "LogDamagedError",
    "OwnerLostError",
    "PartitionError",
    "PendingCommit",
    "PoisonedError",
    "ReadOnlyError",
    "RowIdError",
    "ShardEmbError",
    "SourceError",
    "StaleReaderError",
    "Store",
    "StoreClosedError",
    "StoreExistsError",
    "StoreLockedError",
    "StoreNotFoundError",
    "Table",
    "TableExistsError",
    "TableNotFoundError",
    "TagExistsError",
    "TagNotFoundError",
    "UnknownKeyError",
    "Vocabulary",
    "VocabularyExistsError",
    "VocabularyNotFoundError",
    "__version__",
    "dtypes",
    "exports",
    "initializers",
    "open",
    "optim",
    "text",
]

VOCABULARY = """
add(self, keys: KeysLike) -> NDArray[np.int64]
admission: Admission | None
key_type: KeyType
keys(self, row_ids: ArrayLike) -> NDArray[Any]
lookup(self, keys: KeysLike, *, missing: int = -1) -> NDArray[np.int64]
name: str
num_rows: int
remove(self, keys: KeysLike) -> NDArray[np.int64]
reserved: int
stats(self) -> dict[str, int]
to_arrow_batches(self) -> Iterator[pa.RecordBatch]
"""

KEYED_TABLE = """
bag_weight_gradient(self, keys: KeysLike, offsets: ArrayLike | None, grads: ArrayLike, *, \
mode: "Literal['sum', 'mean', 'sqrtn']" = 'sum', weights: ArrayLike | None = None, padding_key: Any = None, \
include_last_offset: bool = False, missing: Missing = 'error') -> NDArray[np.float32]
closer_than(self, key: Any, other: Any) -> list[Any]
copy_rows(self, source: KeysLike, target: KeysLike) -> None
delete(self, keys: KeysLike) -> NDArray[np.int64]
distances(self, key_or_vector: Any, other_keys: KeysLike = ()) -> NDArray[np.float32]
doesnt_match(self, keys: Sequence[Any]) -> Any
dtype: str | Dtype
embedding_dim: int
evaluate_word_analogies(self, analogies: Lines, restrict_vocab: int | None = 300000, case_insensitive: bool = True, \
dummy4unknown: bool = False) -> tuple[float, list[dict[str, Any]]]
evaluate_word_pairs(self, pairs: Lines, delimiter: str = '\\t', restrict_vocab: int | None = 300000, \
case_insensitive: bool = True, dummy4unknown: bool = False) -> tuple[Correlation, Correlation, float]
evict(self, *, older_than: int | None = None, keep: int | None = None, \
by: "Literal['lru', 'lfu']" = 'lru') -> NDArray[Any]
export(self, path: str | os.PathLike[str], format: str | Format | None = None, *, columns: Sequence[str] = (), \
rows: tuple[int, int] | None = None, where: KeysLike | None = None, changed_since: int | str | None = None, \
resume: bool = False, progress: Progress = None) -> ExportReport
export_parquet(self, path: str | os.PathLike[str], *, columns: Sequence[str] = (), \
rows: tuple[int, int] | None = None, parts: int | None = None, encoding: Encoding = 'plain', \
progress: Progress = None) -> ExportReport
initializer: Initializer
lookup(self, keys: KeysLike, *, missing: Missing = 'error', create: bool = False, \
dtype: DtypeLike | None = None, out: NDArray[Any] | None = None) -> NDArray[Any]
lookup_bag(self, keys: KeysLike, offsets: ArrayLike | None = None, *, mode: Mode = 'sum', \
weights: ArrayLike | None = None, padding_key: Any = None, include_last_offset: bool = False, \
missing: Missing = 'error', create: bool = False, out: NDArray[np.float32] | None = None) \
-> NDArray[np.float32]
lookup_unique(self, keys: KeysLike, *, create: bool = False, dtype: DtypeLike | None = None) \
-> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]
most_similar(self, positive: Words = None, negative: Words = None, topn: int | None = 10, clip_start: int = 0, \
clip_end: int | None = None, restrict_vocab: int | None = None) -> list[tuple[Any, float]] | NDArray[np.float32]
most_similar_cosmul(self, positive: Words = None, negative: Words = None, topn: int | None = 10, \
restrict_vocab: int | None = None) -> list[tuple[Any, float]] | NDArray[np.float32]
n_similarity(self, keys: Sequence[Any], others: Sequence[Any]) -> float
name: str
num_embeddings: int
optimizer: Optimizer | None
prefetch(self, keys: KeysLike, *, for_update: bool = False) -> None
rank(self, key: Any, other: Any) -> int
reset_rows(self, keys: KeysLike) -> None
rows: Table
search(self, queries: ArrayLike, k: int, *, metric: MetricName = 'cosine', keys: KeysLike | None = None, \
exclude: Any = None) -> KeySearchResult
set_optimizer(self, optimizer: Optimizer) -> None
shape: tuple[int, int]
similar_by_vector(self, vector: ArrayLike, topn: int | None = 10, restrict_vocab: int | None = None) \
-> list[tuple[Any, float]] | NDArray[np.float32]
similarity(self, key: Any, other: Any) -> float
state(self, column: str, keys: KeysLike) -> NDArray[np.float32]
stats(self) -> dict[str, Any]
step: int
store: Any
swap_rows(self, keys: KeysLike, others: KeysLike) -> None
to_arrow_batches(self, *, columns: Sequence[str] = (), rows: tuple[int, int] | None = None) -> pa.RecordBatchReader
update(self, keys: KeysLike, grads: ArrayLike, *, padding_key: Any = None, scale_grad_by_freq: bool = False, \
missing: MissingChange = 'error', create: bool = False, scale: float | None = None, check_finite: bool = True) \
-> float | None
update_bag(self, keys: KeysLike, offsets: ArrayLike | None, grads: ArrayLike, *, mode: Mode = 'sum', \
weights: ArrayLike | None = None, padding_key: Any = None, include_last_offset: bool = False, \
scale_grad_by_freq: bool = False, missing: MissingChange = 'error', create: bool = False, \
scale: float | None = None, check_finite: bool = True) -> float | None
vocabulary: Vocabulary
warm(self, keys: KeysLike | None = None, *, progress: Progress = None) -> None
write(self, keys: KeysLike, rows: ArrayLike, *, missing: MissingChange = 'error', create: bool = False, \
check_finite: bool = True) -> None
"""

FUNCTIONS = """
open(path: str | os.PathLike[str], mode: Mode = 'a', *, memory_budget: int | None = None, \
log_bytes: int | None = None, threads: int | None = None, warm: bool = True, commit: str | None = None) -> Store
"""

STORE = """
checkpoint(self) -> None
close(self, *, progress: bool = False) -> None
commit(self, step: int | None = None, metadata: Mapping[str, Any] | None = None, *, wait: bool = True) \
-> Commit | PendingCommit
import_table(self, name: str, source: object, format: str | None = None, *, member: str | None = None, \
columns: str | Sequence[str] = (), tokens: object = None, limit: int | None = None, duplicates: Duplicates = 'first', \
unicode_errors: UnicodeErrors = 'strict', dtype: DtypeLike | None = None, optimizer: Optimizer | None = None, \
rows_per_shard: int | None = None, counters: bool = False, progress: Progress = None) -> ImportReport
changed_keys(self, vocabulary: str, since: str) -> KeyChanges
changed_rows(self, table: str, since: str) -> NDArray[np.int64]
copy(self, path: str | os.PathLike[str], *, update: bool = False, progress: Progress = None) -> None
create_table(self, name: str, *, num_embeddings: int | None = None, embedding_dim: int, \
vocabulary: str | None = None, counters: bool = False, initializer: initializers.Initial | None = None, \
optimizer: Optimizer | None = None, rows_per_shard: int | None = None, padding_idx: int | None = None, \
dtype: DtypeLike = 'float32', state_dtype: str = 'float32', rounding: RoundingLike = 'nearest', \
progress: Progress = None) -> Table | KeyedTable
create_vocabulary(self, name: str, *, key_type: KeyType, admission: Admission | None = None, \
reserved: int = 0) -> Vocabulary
drop_table(self, name: str) -> None
drop_vocabulary(self, name: str) -> None
gradient_norm(self, batches: Mapping[str, tuple[KeysLike | Bags, ArrayLike]], *, \
missing: MissingChange | Mapping[str, MissingChange] = 'error') -> float
has_changes: bool
info(self) -> display.StoreInfo
last_commit: Commit | None
lookup(self, ids: Mapping[str, KeysLike], *, missing: Missing = 'error', create: bool = False) \
-> dict[str, NDArray[np.float32]]
lookup_bag(self, bags: Mapping[str, Any], *, missing: Missing = 'error', create: bool = False) -> dict[str, \
NDArray[np.float32]]
path: Path
refresh(self) -> None
rename_table(self, name: str, new_name: str) -> None
rename_vocabulary(self, name: str, new_name: str) -> None
reshard(self, name: str, *, rows_per_shard: int | None = None, \
optimizer: "Optimizer | Literal['keep'] | None" = 'keep', dtype: DtypeLike | None = None, \
progress: Progress = None) -> Commit
restore(self, name: str) -> Commit
rollback(self) -> None
stats(self) -> dict[str, int]
tag(self, name: str, *, replace: bool = False) -> Commit
tags: Mapping[str, Commit]
untag(self, name: str) -> None
update(self, batches: Mapping[str, tuple[KeysLike | Bags, ArrayLike]], *, \
missing: MissingChange | Mapping[str, MissingChange] = 'error', create: bool = False, \
max_norm: float | None = None, extra_norm_sq: float = 0.0, scale: float | None = None, \
check_finite: bool = True) -> float | None
update_bag(self, batches: Mapping[str, tuple[Any, ...]], *, missing: MissingChange = 'error', \
create: bool = False, scale_grad_by_freq: bool = False, max_norm: float | None = None, \
extra_norm_sq: float = 0.0, scale: float | None = None, check_finite: bool = True) -> float | None
uuid: str
verify(self, tables: Sequence[str] | None = None, *, progress: Progress = None) -> list[Damage]
vocabularies: Mapping[str, Vocabulary]
"""

TABLE = """
bag_weight_gradient(self, ids: ArrayLike, offsets: ArrayLike | None, grads: ArrayLike, *, \
mode: "Literal['sum', 'mean', 'sqrtn']" = 'sum', weights: ArrayLike | None = None, \
padding_idx: int | None = None, include_last_offset: bool = False) -> NDArray[np.float32]
build_index(self, path: str | os.PathLike[str], *, metric: MetricName = 'cosine', links: int = 7, \
progress: Progress = None) -> Index
copy_rows(self, source: ArrayLike, target: ArrayLike) -> None
dtype: str | Dtype
embedding_dim: int
explain(self, ids: ArrayLike) -> Explanation
export(self, path: str | os.PathLike[str], format: str | Format | None = None, *, columns: Sequence[str] = (), \
rows: tuple[int, int] | None = None, where: ArrayLike | None = None, changed_since: int | str | None = None, \
resume: bool = False, progress: Progress = None) -> ExportReport
export_parquet(self, path: str | os.PathLike[str], *, columns: Sequence[str] = (), \
rows: tuple[int, int] | None = None, parts: int | None = None, encoding: Encoding = 'plain', \
progress: Progress = None) -> ExportReport
freeze_rows(self, start: int = 0, stop: int | None = None) -> None
frozen_rows: tuple[tuple[int, int], ...]
initializer: Initializer
lookup(self, ids: ArrayLike, *, dtype: DtypeLike | None = None, out: NDArray[Any] | None = None, \
out_of_range: OutOfRange = 'raise') -> NDArray[Any]
lookup_bag(self, ids: ArrayLike, offsets: ArrayLike | None = None, *, mode: Mode = 'sum', \
weights: ArrayLike | None = None, padding_idx: int | None = None, include_last_offset: bool = False, \
out_of_range: OutOfRange = 'raise', out: NDArray[np.float32] | None = None) -> NDArray[np.float32]
lookup_unique(self, ids: ArrayLike, *, dtype: DtypeLike | None = None) \
-> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]
materialize(self, *, progress: Progress = None) -> None
name: str
nbytes: int
num_embeddings: int
open_index(self, path: str | os.PathLike[str]) -> Index
optimizer: Optimizer | None
padding_idx: int | None
prefetch(self, ids: ArrayLike, *, for_update: bool = False) -> None
reset_rows(self, ids: ArrayLike) -> None
resize(self, num_embeddings: int, *, drop_rows: bool = False) -> None
rows_per_shard: int
search(self, queries: ArrayLike, k: int, *, metric: MetricName = 'cosine', \
rows: tuple[int, int] | ArrayLike | None = None, exclude: ArrayLike | Sequence[ArrayLike] | None = None) -> SearchResult
set_optimizer(self, optimizer: Optimizer) -> None
shape: tuple[int, int]
state(self, column: str, ids: ArrayLike) -> NDArray[np.float32]
stats(self) -> dict[str, Any]
set_step(self, step: int) -> None
step: int
store: Any
swap_rows(self, rows: ArrayLike, others: ArrayLike) -> None
to_arrow_batches(self, *, columns: Sequence[str] = (), rows: tuple[int, int] | None = None) -> pa.RecordBatchReader
to_dask_array(self) -> dask.array.Array
unfreeze_rows(self, start: int = 0, stop: int | None = None) -> None
update(self, ids: ArrayLike, grads: ArrayLike, *, padding_idx: int | None = None, \
scale_grad_by_freq: bool = False, scale: float | None = None, check_finite: bool = True) -> float | None
update_bag(self, ids: ArrayLike, offsets: ArrayLike | None, grads: ArrayLike, *, mode: Mode = 'sum', \
weights: ArrayLike | None = None, padding_idx: int | None = None, include_last_offset: bool = False, \
scale_grad_by_freq: bool = False, scale: float | None = None, check_finite: bool = True) -> float | None
warm(self, rows: ArrayLike | None = None, *, progress: Progress = None) -> None
write(self, ids: ArrayLike, rows: ArrayLike, *, check_finite: bool = True) -> None
write_state(self, ids: ArrayLike, state: Mapping[str, ArrayLike], *, check_finite: bool = True) -> None
"""

OPTIMIZERS = """
AMSGrad(lr: float | LearningRate = 0.001, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, *, \
eps_after_correction: bool = True)
Adadelta(lr: float | LearningRate = 1.0, rho: float = 0.9, eps: float = 1e-06)
Adagrad(lr: float | LearningRate = 0.01, lr_decay: float = 0.0, eps: float = 1e-10, \
initial_accumulator_value: float = 0.0, *, eps_inside_root: bool = False)
Adam(lr: float | LearningRate = 0.001, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, *, \
eps_after_correction: bool = False)
AdamW(lr: float | LearningRate = 0.001, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, *, \
weight_decay: float = 0.01, decoupled_weight_decay: bool = True, eps_after_correction: bool = True)
Adamax(lr: float | LearningRate = 0.002, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, *, \
eps_outside_maximum: bool = False)
FTRL(lr: float | LearningRate = 0.001, initial_accumulator_value: float = 0.1, l1_strength: float = 0.0, \
l2_strength: float = 0.0, l2_shrinkage: float = 0.0, beta: float = 0.0)
LAMB(lr: float | LearningRate = 0.001, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08)
LARS(lr: float | LearningRate = 0.01, momentum: float = 0.9, eta: float = 0.001)
Lion(lr: float | LearningRate = 0.001, betas: tuple[float, float] = (0.9, 0.99))
NAdam(lr: float | LearningRate = 0.002, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, \
momentum_decay: float = 0.004)
Optimizer(*, maximize: bool = False, clip_value: float | None = None, clip_norm: float | None = None, \
l1: float = 0.0, weight_decay: float = 0.0, decoupled_weight_decay: bool = False, \
max_norm: float | None = None, constraint: str | None = None, rowwise_bias_correction: bool = False, \
dense_equivalent: bool = False)
PartialRowWiseAdam(lr: float | LearningRate = 0.001, betas: tuple[float, float] = (0.9, 0.999), \
eps: float = 1e-08, *, eps_after_correction: bool = True)
PartialRowWiseLAMB(lr: float | LearningRate = 0.001, betas: tuple[float, float] = (0.9, 0.999), \
eps: float = 1e-08)
RMSprop(lr: float | LearningRate = 0.01, alpha: float = 0.99, eps: float = 1e-08, momentum: float = 0.0, \
centered: bool = False, *, eps_inside_root: bool = False, lr_in_momentum: bool = False)
RowWiseAdagrad(lr: float | LearningRate = 0.01, eps: float = 1e-08, *, lr_decay: float = 0.0, \
initial_accumulator_value: float = 0.0, eps_inside_root: bool = False)
RowWiseRMSprop(lr: float | LearningRate = 0.01, alpha: float = 0.99, eps: float = 1e-08, *, \
eps_inside_root: bool = False)
SGD(lr: float | LearningRate = 0.01, *, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False, \
lr_in_momentum: bool = False)
"""

SCHEDULES = """
CosineDecay(lr: float, decay_steps: int, min_lr: float = 0.0, warmup_steps: int = 0)
InverseSquareRoot(lr: float, warmup_steps: int = 1)
LinearWarmup(lr: float, warmup_steps: int = 0)
StepDecay(lr: float, step_size: int, gamma: float = 0.1, warmup_steps: int = 0)
"""

INITIALIZERS = """
Constant(value: float = 0.0)
GlorotNormal(seed: int = 0) -> VarianceScaling
GlorotUniform(seed: int = 0) -> VarianceScaling
HeNormal(seed: int = 0) -> VarianceScaling
HeUniform(seed: int = 0) -> VarianceScaling
Initializer()
Normal(mean: float = 0.0, std: float = 1.0, seed: int = 0)
TruncatedNormal(mean: float = 0.0, std: float = 1.0, low: float | None = None, high: float | None = None, seed: int = 0)
Uniform(low: float, high: float, seed: int = 0)
VarianceScaling(scale: float = 1.0, fan: Fan = 'fan_avg', distribution: Distribution = 'truncated_normal', \
seed: int = 0)
"""

DTYPES = """
BlockScaled(values: "Literal['float8_e4m3fn', 'float8_e5m2']" = 'float8_e4m3fn', block: int = 32)
ScaledInt8(bias: bool = True)
Stochastic(seed: int = 0)
"""

EXPORTS = """
Arrow()
ExportReport(path: Path | str, files: tuple[Path | str, ...], num_rows: int, nbytes: int, \
removed_path: Path | str | None = None, num_removed: int = 0)
Format()
Lance()
Npy()
Parquet(parts: int | None = None, encoding: Encoding = 'plain', partition_by: PartitionBy = None)
Projector(sample: Any = 10000, by: "Literal['random', 'count']" = 'random', seed: int = 0)
Safetensors(tensor: str = 'embedding', max_bytes: int = 5000000000)
Word2VecBinary()
Word2VecText()
format_of(path: object, given: str | Format | None = None, what: str = '') -> Format
"""

TEXT = """
Encoder(vocabulary: Vocabulary, *, split: Callable[[str], Iterable[str]] | Tokenizer = words, lower: bool = True, \
max_length: int | None = None, padding_row: int = 0, unknown_row: int = 1)
read_lines(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Iterator[str]
words(sentence: str) -> list[str]
"""

ENCODER = """
batches(self, sentences: Iterable[str], size: int, *, create: bool = False) -> Iterator[NDArray[np.int64]]
decode(self, ids: ArrayLike) -> list[list[str]]
encode(self, sentences: Iterable[str], *, create: bool = False) -> NDArray[np.int64]
"""

DISTRIBUTED = """
local_cluster(workers: int = 2, *, threads_per_worker: int = 1) -> distributed.LocalCluster
merge(head: str | os.PathLike[str], store: str | os.PathLike[str], *, folder: str | os.PathLike[str] | None = None, \
progress: Progress = None) -> Commit
open(client: distributed.Client, path: str | os.PathLike[str], *, owners: Mapping[str, str | os.PathLike[str]] | \
None = None, partitions: int | None = None, mode: "Literal['a', 'r+', 'w-']" = 'a', deadline_s: float = 60.0, \
recover_s: float = 60.0) -> DistributedStore
split(store: str | os.PathLike[str], head: str | os.PathLike[str], *, partitions: int = 16, folder: str | \
os.PathLike[str] | None = None, progress: Progress = None) -> Commit
"""

DISTRIBUTED_STORE = """
close(self) -> None
commit(self, step: int | None = None, metadata: Mapping[str, Any] | None = None) -> Commit
create_table(self, name: str, *, num_embeddings: int, embedding_dim: int, counters: bool = False, initializer: \
initializers.Initializer | initializers.VarianceScaling | None = None, optimizer: Optimizer | None = None, \
rows_per_shard: int | None = None, padding_idx: int | None = None, dtype: DtypeLike = 'float32', state_dtype: str = \
'float32', rounding: RoundingLike = 'nearest') -> DistributedTable
drop_table(self, name: str) -> None
gradient_norm(self, batches: Mapping[str, tuple[Any, ArrayLike]], *, missing: MissingChange | Mapping[str, \
MissingChange] = 'error') -> float
has_changes: bool
info(self) -> dict[int, StoreInfo]
last_commit: Commit | None
lookup(self, ids: Mapping[str, ArrayLike], *, missing: Missing = 'error', create: bool = False) -> dict[str, \
NDArray[np.float32]]
lookup_bag(self, bags: Mapping[str, Any], *, missing: Missing = 'error', create: bool = False) -> dict[str, \
NDArray[np.float32]]
partitions: int
path: str
rollback(self) -> None
stats(self) -> dict[int, Mapping[str, int]]
update(self, batches: Mapping[str, tuple[Any, ArrayLike]], *, missing: MissingChange | Mapping[str, MissingChange] =\
 'error', create: bool = False, max_norm: float | None = None, extra_norm_sq: float = 0.0, scale: float | None = \
None, check_finite: bool = True) -> float | None
update_bag(self, batches: Mapping[str, tuple[Any, ...]], *, missing: MissingChange = 'error', create: bool = False, \
scale_grad_by_freq: bool = False, max_norm: float | None = None, extra_norm_sq: float = 0.0, scale: float | None = \
None, check_finite: bool = True) -> float | None
uuid: str
verify(self, tables: Sequence[str] | None = None) -> dict[int, list[Damage]]
"""

DISTRIBUTED_TABLE = """
bag_weight_gradient(self, ids: ArrayLike, offsets: ArrayLike | None, grads: ArrayLike, *, mode: "Literal['sum', \
'mean', 'sqrtn']" = 'sum', weights: ArrayLike | None = None, padding_idx: int | None = None, include_last_offset: \
bool = False) -> NDArray[np.float32]
dtype: str | Dtype
embedding_dim: int
export_parquet(self, path: str | os.PathLike[str], *, columns: Sequence[str] = (), rows: tuple[int, int] | None = \
None, parts: int | None = None, encoding: Encoding = 'plain', progress: Progress = None) -> ExportReport
initializer: initializers.Initializer
lookup(self, ids: ArrayLike, *, dtype: str | None = None, out: NDArray[Any] | None = None) -> NDArray[Any]
lookup_bag(self, ids: ArrayLike, offsets: ArrayLike | None = None, *, mode: Mode = 'sum', weights: ArrayLike | None \
= None, padding_idx: int | None = None, include_last_offset: bool = False) -> NDArray[np.float32]
lookup_unique(self, ids: ArrayLike, *, dtype: str | None = None) -> tuple[NDArray[Any], NDArray[np.int64], \
NDArray[np.int64]]
name: str
num_embeddings: int
optimizer: Optimizer | None
padding_idx: int | None
prefetch(self, ids: ArrayLike, *, for_update: bool = False) -> None
set_optimizer(self, optimizer: Optimizer) -> None
shape: tuple[int, int]
state(self, column: str, ids: ArrayLike) -> NDArray[np.float32]
step: int
store: Any
to_arrow_batches(self, *, columns: Sequence[str] = (), rows: tuple[int, int] | None = None) -> pa.RecordBatchReader
to_dask_array(self) -> dask.array.Array
update(self, ids: ArrayLike, grads: ArrayLike, *, padding_idx: int | None = None, scale_grad_by_freq: bool = False, \
scale: float | None = None, check_finite: bool = True) -> float | None
update_bag(self, ids: ArrayLike, offsets: ArrayLike | None, grads: ArrayLike, *, mode: Mode = 'sum', weights: \
ArrayLike | None = None, padding_idx: int | None = None, include_last_offset: bool = False, scale_grad_by_freq: bool\
 = False, scale: float | None = None, check_finite: bool = True) -> float | None
write(self, ids: ArrayLike, rows: ArrayLike, *, check_finite: bool = True) -> None
"""

TORCH = """
EmbeddingBagCollection(tables: Mapping[str, AnyTable] | Sequence[AnyTable], \
features: Mapping[str, str] | None = None, *, mode: str | Mapping[str, str] = 'sum', is_weighted: bool = False, \
dtype: torch.dtype = torch.float32, missing: Missing = 'error', create: bool = False)
EmbeddingCollection(tables: Mapping[str, AnyTable] | Sequence[AnyTable], \
features: Mapping[str, str] | None = None, *, dtype: torch.dtype = torch.float32, missing: Missing = 'error', \
create: bool = False)
JaggedTensor(rows: torch.Tensor, bounds: torch.Tensor)
KeyedTensor(features: Mapping[str, torch.Tensor])
Embedding(table: AnyTable, padding_idx: Any = None, max_norm: float | None = None, norm_type: float = 2.0, \
scale_grad_by_freq: bool = False, *, dtype: torch.dtype = torch.float32, missing: Missing = 'error', \
create: bool = False)
EmbeddingBag(table: AnyTable, max_norm: float | None = None, norm_type: float = 2.0, \
scale_grad_by_freq: bool = False, mode: "Literal['mean', 'sum', 'max']" = 'mean', \
include_last_offset: bool = False, padding_idx: Any = None, *, dtype: torch.dtype = torch.float32, \
missing: Missing = 'error', create: bool = False)
Optimizer(modules: Modules, lr: float | None = None, *, fused: bool = False)
Pipeline(model: torch.nn.Module, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], \
loader: Iterable[Any] | None = None, depth: int = 2, *, loss: Loss | None = None, ids: Ids | None = None)
Ranks(store: Any = None, group: dist.ProcessGroup | None = None, *, owner: int = 0, \
reduce: "Literal['mean', 'sum']" = 'mean', timeout: float = 1800.0)
clip_grad_norm_(modules: Modules, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, \
foreach: bool | None = None) -> torch.Tensor
from_module(module: torch.nn.Module, store: Any, name: str, *, optimizer: optim.Optimizer | None = None, \
optimizer_state: torch.optim.Optimizer | None = None, dtype: DtypeLike = 'float32') -> Embedding | EmbeddingBag
from_pretrained(embeddings: torch.Tensor | ArrayLike | str | os.PathLike[str], store: Any, name: str, \
freeze: bool = True, padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0, *, \
optimizer: optim.Optimizer | None = None) -> Embedding
load(path: str | os.PathLike[str], model: torch.nn.Module, optimizer: Optimizers, store: Any, *, \
others: Mapping[str, Any] | None = None, random_state: bool = True) -> Commit
prefetching(loader: Iterable[Batch], model: torch.nn.Module, depth: int = 2, *, \
ids: Ids | None = None) -> Prefetching[Batch]
save(path: str | os.PathLike[str], model: torch.nn.Module, optimizer: Optimizers, store: Any, step: int | None = None, \
*, others: Mapping[str, Any] | None = None, metadata: Mapping[str, Any] | None = None) -> Commit
to_module(module: torch.nn.Module) -> torch.nn.Embedding | torch.nn.EmbeddingBag
"""

DYNAMICEMB = """
external_storage(store: Store, name: str = 'dynamicemb') -> type[TableStorage]
"""


COMMON = inspect.signature(optim.Optimizer).parameters.values()


def signature(name, value):
    if isinstance(value, property):
        return f"{name}: {value.fget.__annotations__['return']}"
    found = inspect.signature(value)
    if value in optim.OPTIMIZERS.values():  # what all have in common stands at `Optimizer`
        own = [each for each in found.parameters.values() if each not in COMMON]
        found = found.replace(parameters=own)
    shown = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(found))
    shown = re.sub(r"<function (\w+) at 0x\w+>", r"\1", shown)
    return name + (shown.removesuffix(" -> None") if inspect.isclass(value) else shown)


def public_members(cls):
    return {name: value for name, value in vars(cls).items() if not name.startswith("_")}


def signatures(members):
    return [signature(name, value) for name, value in sorted(members.items())]


# ---- names ------------------------------------------------------------------------------------------------------


def test_public_names_are_pinned():
    assert shardemb.__all__ == NAMES
    assert dir(shardemb) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there(name):
    assert getattr(shardemb, name) is not None
    assert getattr(shardemb, name) is getattr(shardemb, name)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'shardemb' has no attribute 'Shards'"):
        shardemb.Shards  # noqa: B018


def test_star_import_gives_the_public_names():
    namespace = {}
    exec("from shardemb import *", namespace)
    assert set(NAMES) <= set(namespace)


def test_the_version_is_that_of_the_distribution():
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", shardemb.__version__)
    assert shardemb.__version__ == importlib.metadata.version("shardemb")


def test_types_come_with_the_package():
    assert (Path(shardemb.__file__).parent / "py.typed").exists()


# ---- signatures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "pinned"),
    [
        ({"open": shardemb.open}, FUNCTIONS),
        (public_members(shardemb.Store), STORE),
        (public_members(shardemb.Table), TABLE),
        (public_members(shardemb.Vocabulary), VOCABULARY),
        (public_members(shardemb.KeyedTable), KEYED_TABLE),
        ({name: getattr(optim, name) for name in optim.__all__ if name != "schedules"}, OPTIMIZERS),
        (schedules.SCHEDULES, SCHEDULES),
        ({name: getattr(dtypes, name) for name in dtypes.__all__}, DTYPES),
        ({name: getattr(exports, name) for name in exports.__all__}, EXPORTS),
        ({name: getattr(initializers, name) for name in initializers.__all__}, INITIALIZERS),
        ({name: getattr(text, name) for name in ("Encoder", "read_lines", "words")}, TEXT),
        ({name: getattr(text.Encoder, name) for name in ("batches", "decode", "encode")}, ENCODER),
    ],
    ids=[
        "functions",
        "Store",
        "Table",
        "Vocabulary",
        "KeyedTable",
        "optim",
        "schedules",
        "dtypes",
        "exports",
        "initializers",
        "text",
        "Encoder",
    ],
)
def test_signatures_are_pinned(members, pinned):
    assert signatures(members) == sorted(pinned.strip().split("\n"))


@pytest.mark.parametrize(
    ("module", "pinned"), [("shardemb.torch", TORCH), ("shardemb.dynamicemb", DYNAMICEMB)]
)
def test_signatures_for_torch_are_pinned(module, pinned):
    pytest.importorskip("torch")
    names = importlib.import_module(module)
    members = {name: getattr(names, name) for name in names.__all__}
    assert signatures(members) == sorted(pinned.strip().split("\n"))


def test_signatures_for_several_machines_are_pinned():
    """But for what a store offers to its tables."""
    pytest.importorskip("distributed.client", reason="distributed is not installed")
    names = importlib.import_module("shardemb.distributed")
    classes = {"DistributedStore": DISTRIBUTED_STORE, "DistributedTable": DISTRIBUTED_TABLE}
    assert set(classes) < set(names.__all__)
    members = {name: getattr(names, name) for name in names.__all__ if name not in classes}
    assert signatures(members) == sorted(DISTRIBUTED.strip().split("\n"))
    inner = {"link", "facts", "look_again", "take_steps"}
    for name, pinned in classes.items():
        found = public_members(getattr(names, name))
        members = {each: value for each, value in found.items() if each not in inner}
        assert signatures(members) == sorted(pinned.strip().split("\n"))


def test_a_store_is_a_context_manager_and_a_mapping_of_its_tables():
    for name in ("__enter__", "__exit__", "__getitem__", "__iter__", "__len__", "__repr__", "_repr_html_"):
        assert name in vars(shardemb.Store)
    assert issubclass(shardemb.Store, importlib.import_module("collections.abc").Mapping)


def test_a_table_has_a_length_and_shows_itself():
    assert {"__len__", "__repr__", "_repr_html_"} <= set(vars(shardemb.Table))


def test_a_commit_is_a_frozen_record():
    assert signature("Commit", shardemb.Commit) == "Commit(id: int, step: int, metadata: dict[str, Any])"
    with pytest.raises(AttributeError):
        shardemb.Commit(1, 2, {}).step = 3


# ---- promises ---------------------------------------------------------------------------------------------------

METHODS = [
    pytest.param(value, id=f"{cls.__name__}.{name}")
    for cls in (shardemb.Store, shardemb.Table)
    for name, value in public_members(cls).items()
    if not isinstance(value, property)
] + [pytest.param(shardemb.open, id="open")]

PROPERTIES = [
    pytest.param(value, id=f"{cls.__name__}.{name}")
    for cls in (shardemb.Store, shardemb.Table)
    for name, value in public_members(cls).items()
    if isinstance(value, property)
]

VALUES = [
    pytest.param(getattr(module, name), id=name)
    for module in (optim, initializers)
    for name in module.__all__
    if name not in ("Initializer", "schedules")
] + [pytest.param(each, id=name) for name, each in schedules.SCHEDULES.items()]


def sections(value):
    """Split a numpydoc docstring: the summary under "", every section under its heading."""
    lines = inspect.cleandoc(value.__doc__).splitlines()
    found, heading = {"": []}, ""
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if following and set(following) == {"-"} and len(following) == len(line):
            heading = line
            found[heading] = []
        elif not (line and set(line) == {"-"}):
            found[heading].append(line)
    return {heading: "\n".join(lines).strip() for heading, lines in found.items()}


def documented_parameters(text):
    """The names before a colon on lines that are not indented."""
    names = []
    for line in text.splitlines():
        if match := re.match(r"([a-z0-9_, ]+) : ", line):
            names += match[1].split(", ")
    return names


@pytest.mark.parametrize("function", METHODS)
def test_every_method_documents_all_of_its_parameters_in_order(function):
    expected = [name for name in inspect.signature(function).parameters if name != "self"]
    assert documented_parameters(sections(function).get("Parameters", "")) == expected


@pytest.mark.parametrize("function", METHODS)
def test_every_method_documents_what_it_returns(function):
    returns = inspect.signature(function).return_annotation != "None"
    assert bool(sections(function).get("Returns")) == returns


@pytest.mark.parametrize("function", METHODS)
def test_every_method_documents_what_it_raises(function):
    raised = sections(function).get("Raises", "")
    assert raised or function.__name__ in ("close", "stats")  # these never raise on their own account
    for name in re.findall(r"\b[A-Z]\w+Error\b", raised):
        assert hasattr(shardemb, name) or hasattr(importlib.import_module("builtins"), name)


@pytest.mark.parametrize("value", [*METHODS, *VALUES, shardemb.Store, shardemb.Table])
def test_everything_has_an_example_that_can_be_run(value):
    assert ">>> " in sections(value)["Examples"]


@pytest.mark.parametrize(
    "value", [*METHODS, *PROPERTIES, *VALUES, shardemb.Store, shardemb.Table, shardemb.Commit]
)
def test_everything_has_a_summary_of_one_sentence_or_more(value):
    first = sections(value)[""].split("\n\n")[0]
    assert first[0].isupper() or first[0] == "`"
    assert first.endswith((".", ":"))


@pytest.mark.parametrize("cls", VALUES)
def test_every_value_documents_its_fields(cls):
    documented = documented_parameters(sections(cls)["Parameters"])
    expected = inspect.signature(cls).parameters
    if cls in optim.OPTIMIZERS.values():  # `Optimizer` describes what all have in common
        expected = [name for name, each in expected.items() if name in documented or each not in COMMON]
        assert "`Optimizer`" in sections(cls)["Notes"]
        documented.sort(key=expected.index)
    assert documented == list(expected)


def test_a_commit_documents_its_fields():
    fields = documented_parameters(sections(shardemb.Commit)["Attributes"])
    assert fields == list(inspect.signature(shardemb.Commit).parameters)


@pytest.mark.parametrize("name", ["lookup", "lookup_unique", "state"])
def test_who_gets_an_array_is_told_whose_memory_it_is(name):
    assert "caller's own" in sections(getattr(shardemb.Table, name))["Returns"]
