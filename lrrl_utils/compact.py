"""A study in one compressed Parquet file, a row per run.

Columns: `folder` (below the study), `config` and `summary` (the texts of the JSON files), `episodes` and `rounds`
(a struct of lists, one for each column of the CSV file; null for a column, or a field, that a run does not have).
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lrrl_utils.files import written_whole
from lrrl_utils.runs import Record
from lrrl_utils.terminal import reject

ENCODINGS = {"double": "BYTE_STREAM_SPLIT", "int64": "DELTA_BINARY_PACKED", "string": "PLAIN"}  # of numbers that drift


def as_lists(columns):
    """The columns of a CSV file, {column: (rows,) array} or an error for each run, as an array of structs of lists."""
    columns = [x if isinstance(x, dict) else {} for x in columns]
    arrays = {}
    fullest_first = sorted(columns, key=len, reverse=True)  # it has the order of the columns
    for name in dict.fromkeys(name for of_run in fullest_first for name in of_run) or ["global_step"]:
        values = [of_run.get(name) for of_run in columns]
        together = np.concatenate([np.zeros(0), *(x for x in values if x is not None)])
        if together.dtype.kind == "f":
            numbers = together[~np.isnan(together)]
            whole = np.all((np.abs(numbers) < 2**53) & (numbers == np.round(numbers)))
            kind = pa.int64() if whole else pa.float64()
        else:
            kind = pa.string()
        lists = [None if x is None else pa.array(x, from_pandas=True).cast(kind).tolist() for x in values]
        arrays[name] = pa.array(lists, pa.list_(kind))
    return pa.StructArray.from_arrays(list(arrays.values()), list(arrays))


def write_parquet(records, path):
    """Write `records` to `path`, numbers to their last digit. Raises OSError if it cannot be written."""
    texts = {name: [getattr(record, name) for record in records] for name in ("folder", "config", "summary")}
    lists = {name: as_lists([getattr(record, name) for record in records]) for name in ("episodes", "rounds")}
    encodings = {
        f"{name}.{field.name}.list.element": ENCODINGS[str(field.type.value_type)]
        for name, structs in lists.items()
        for field in structs.type
    }
    options = {"compression": "zstd", "compression_level": 19, "use_dictionary": ["folder", "config"]}
    with written_whole(path) as file:
        pq.write_table(pa.table(texts | lists), file, column_encoding=encodings, **options)


def read_parquet(path):
    """The Records in a file of `write_parquet`; `reject` another file."""
    try:
        table = pq.read_table(path, columns=["folder", "config", "summary", "episodes", "rounds"])
        texts = [[str(text) for text in table.column(name).to_pylist()] for name in ("folder", "config", "summary")]
        lists = [as_columns(table.column(name).combine_chunks()) for name in ("episodes", "rounds")]
    except Exception as error:  # of many kinds: a file can hold anything
        reject(f"{path}: must be a folder of run folders, or a file of --compact ({error!s:.200})")
    missing = ValueError("no such file")
    return [
        Record(folder, summary, config, episodes or missing, rounds or None)
        for folder, config, summary, episodes, rounds in zip(*texts, *lists)
    ]


def as_columns(structs):
    """[{column: (rows,) array}, …], a dict for each of the structs of lists."""
    columns = [{} for _ in range(len(structs))]
    for i, field in enumerate(structs.type):
        for of_run, values in zip(columns, structs.field(i)):
            if values.is_valid:
                array = values.values.to_numpy(zero_copy_only=False)
                of_run[field.name] = array.astype(str if array.dtype == object else float)
    return columns
