"""Writes the files of this folder by programs that the project does not depend on: write.py WRITER FOLDER.

WRITER: datasets, polars, duckdb, fastparquet, pandas. Each file has the same 24 rows: an image, a caption and a number.
"""

import importlib.metadata
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROWS = 24


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((32, 32)).save(out, "JPEG", quality=50)
    return out.getvalue()


def columns():
    images = [jpeg(seed) for seed in range(ROWS)]
    return images, [f"a caption of row {row}" for row in range(ROWS)], list(range(ROWS))


def write_datasets(path):
    import datasets

    images, captions, numbers = columns()
    rows = {"image": [{"bytes": image, "path": None} for image in images], "caption": captions, "number": numbers}
    features = datasets.Features(
        image=datasets.Image(), caption=datasets.Value("string"), number=datasets.Value("int64")
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))


def write_polars(path):
    import polars

    images, captions, numbers = columns()
    polars.DataFrame({"image": images, "caption": captions, "number": numbers}).write_parquet(path)


def write_duckdb(path):
    import duckdb
    import pandas

    images, captions, numbers = columns()
    frame = pandas.DataFrame({"image": images, "caption": captions, "number": numbers})
    connection = duckdb.connect()
    connection.register("frame", frame)
    connection.execute(f"COPY (SELECT * FROM frame ORDER BY number) TO '{path}' (FORMAT parquet)")


def write_fastparquet(path):
    import fastparquet
    import pandas

    images, captions, numbers = columns()
    frame = pandas.DataFrame({"image": images, "caption": captions, "number": numbers})
    encodings = {"image": "bytes", "caption": "utf8"}
    fastparquet.write(str(path), frame, object_encoding=encodings)


def write_pandas(path):
    import pandas

    images, captions, numbers = columns()
    pandas.DataFrame({"image": images, "caption": captions, "number": numbers}).to_parquet(path, engine="pyarrow")


if __name__ == "__main__":
    writer = sys.argv[1]
    version = importlib.metadata.version(writer)
    path = Path(sys.argv[2]) / f"{writer}-{version}.parquet"
    globals()[f"write_{writer}"](path)
    print(path, path.stat().st_size)
