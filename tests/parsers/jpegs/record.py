"""Records ``corpus.tar.xz``: small JPEG files of many encoders, and ``corpus.json``, the command that wrote each.

    python -m tests.parsers.jpegs.record PROGRAMS

Run it with a Python that has the packages of ``PACKAGES``. cjpeg, jpegtran, gm, ffmpeg, pnmtojpeg, guetzli, php with
gd, go, node, java, javac and chromium-headless-shell must be on the PATH; PROGRAMS is a folder for compiled programs,
with node_modules of jpeg-js and sharp. An encoder that is not installed is an error. The pictures are drawn here.

A command that starts with ``python:`` is an expression with the picture as PIL image (``image``) and as array
(``rgb``); others are commands of a shell, with the picture as {ppm}, {png} and {rgba}, and {out} to write.
"""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import cv2
import jpeglib
import numpy as np
import pyvips
import skia
from PIL import Image, ImageCms, ImageDraw
from PySide6.QtCore import QBuffer, QByteArray, QIODevice
from PySide6.QtGui import QImage, QImageWriter

HERE = Path(__file__).resolve().parent
PACKAGES = (
    "imagecodecs", "jpeglib", "mozjpeg-lossless-optimization", "opencv-python-headless", "Pillow", "playwright",
    "PySide6_Essentials", "pyvips", "simplejpeg", "skia-python",
)  # fmt: skip
SIZES = ((96, 64), (75, 58), (64, 64), (130, 47), (33, 80), (17, 16))
SAMPLINGS = (
    "1x1", "2x1", "2x2", "1x2", "4x1", "1x4", "4x2", "2x4", "3x1", "1x3", "3x2", "2x3", "2x1,1x2,1x1", "2x2,2x1,1x1",
    "1x1,2x2,2x2", "2x2,1x1,2x2",
)  # fmt: skip
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def drawing(number):
    """A picture of its own for each number: a gradient, shapes and, for every third one, noise."""
    width, height = SIZES[number % len(SIZES)]
    random = np.random.default_rng(number)
    corners = Image.fromarray(random.integers(0, 256, (3, 4, 3), np.uint8))
    image = corners.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = random.integers(0, width), random.integers(0, height)
        colour = tuple(random.integers(0, 256, 3).tolist())
        draw.ellipse([x, y, x + random.integers(4, 40), y + random.integers(4, 30)], fill=colour)
        draw.line([x, y, random.integers(0, width), random.integers(0, height)], fill=colour[::-1])
    if number % 3 == 0:
        noise = random.normal(0, 12, (height, width, 3))
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return image


def pillow(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def exif(image, orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return pillow(image, exif=tags, quality=80)


def multi_picture(image):
    buffer = io.BytesIO()
    image.save(buffer, "MPO", save_all=True, append_images=[image.resize((32, 32))], quality=70)
    return buffer.getvalue()


def qt(rgb, quality, progressive=False, optimized=False):
    height, width = rgb.shape[:2]
    picture = QImage(np.ascontiguousarray(rgb).tobytes(), width, height, 3 * width, QImage.Format.Format_RGB888)
    content = QByteArray()
    buffer = QBuffer(content)
    buffer.open(QIODevice.OpenModeFlag.WriteOnly)
    writer = QImageWriter(buffer, b"jpeg")
    writer.setQuality(quality)
    writer.setProgressiveScanWrite(progressive)
    writer.setOptimizedWrite(optimized)
    assert writer.write(picture), writer.errorString()
    return bytes(content)


def of_skia(rgb, quality):
    rgba = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
    return bytes(skia.Image.fromarray(rgba, skia.kRGBA_8888_ColorType).encodeToData(skia.kJPEG, quality))


def of_vips(rgb, **options):
    return pyvips.Image.new_from_array(rgb).jpegsave_buffer(**options)


def of_jpeglib(rgb, version, **options):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jpg"
        picture = jpeglib.from_spatial(np.ascontiguousarray(rgb))
        picture.samp_factor = options.pop("samp_factor", "4:2:0")
        with jpeglib.version(version):
            picture.write_spatial(str(path), **options)
        return path.read_bytes()


def of_opencv(rgb, *options):
    return cv2.imencode(".jpg", rgb[..., ::-1], list(options))[1].tobytes()


def without_tables(data):
    """A file without its Huffman tables, as frames of motion JPEG: readers must know the usual ones."""
    at = 2
    kept = [data[:2]]
    while data[at + 1] != 0xDA:
        size = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] != 0xC4:
            kept.append(data[at : at + size])
        at += size
    return b"".join([*kept, data[at:]])


class Canvas:
    """Chromium's canvas.toBlob."""

    def __init__(self):
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        path = shutil.which("chromium-headless-shell") or shutil.which("chromium")
        self._browser = self._playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        self._page = self._browser.new_page()

    def encode(self, image, quality):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        code = """async ([address, quality]) => {
            const picture = new Image();
            picture.src = address;
            await picture.decode();
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [picture.width, picture.height];
            canvas.getContext("2d").drawImage(picture, 0, 0);
            return canvas.toDataURL("image/jpeg", quality);
        }"""
        return base64.b64decode(self._page.evaluate(code, [address, quality]).split(",")[1])

    def close(self):
        self._browser.close()
        self._playwright.stop()


def commands():
    """Encoder -> the commands, each for a picture of its own."""
    cjpeg = [f"cjpeg -quality 80 -sample {sampling} {{ppm}} > {{out}}" for sampling in SAMPLINGS]
    cjpeg += [f"cjpeg -quality 70 -sample {sampling} -restart 1B {{ppm}} > {{out}}" for sampling in SAMPLINGS]
    cjpeg += [f"cjpeg -quality 60 -sample {sampling} -progressive {{ppm}} > {{out}}" for sampling in SAMPLINGS[:6]]
    cjpeg += [
        f"cjpeg {options} {{ppm}} > {{out}}"
        for options in (
            "-arithmetic", "-arithmetic -restart 1", "-arithmetic -progressive", "-grayscale", "-grayscale -restart 2B",
            "-grayscale -sample 2x2", "-rgb", "-rgb -restart 1", "-optimize", "-restart 1", "-restart 3B",
            "-progressive -restart 1", "-dct float", "-dct fast -quality 5", "-quality 100",
            "-quality 100 -sample 1x1", "-quality 1", "-smooth 30", "-baseline -quality 10",
            "-quality 90,20 -sample 2x1", "-grayscale -progressive",
            "-sample 2x2 -restart 1B -optimize", "-sample 1x1 -restart 7B", "-sample 2x1 -restart 1B -quality 95",
        )
    ]  # fmt: skip
    jpegtran = [
        f"cjpeg -quality 85 {{ppm}} | jpegtran {options} > {{out}}"
        for options in ("-restart 1B", "-progressive", "-arithmetic", "-optimize", "-flip horizontal", "-grayscale")
    ]
    pil = [
        f"python: pillow(image, {options})"
        for options in (
            "quality=75", "quality=95, subsampling=0", "quality=85, subsampling=1", "quality=85, subsampling=2",
            "quality=80, progressive=True", "quality=80, optimize=True", "quality=80, restart_marker_blocks=1",
            "quality=60, restart_marker_rows=1", "quality=80, keep_rgb=True", "quality=80, subsampling='4:1:1'",
            "quality=80, icc_profile=SRGB", "quality=80, comment=b'drawn'", "quality=1", "quality=100", "dpi=(72, 72)",
            "quality=70, subsampling=0, restart_marker_blocks=1", "quality=70, subsampling=1, restart_marker_blocks=3",
        )
    ]  # fmt: skip
    pil += [f"python: pillow(image.convert({mode!r}), quality=80)" for mode in ("L", "CMYK", "YCbCr", "1")]
    pil += ["python: pillow(image.convert('L'), restart_marker_blocks=1)"]
    pil += ["python: pillow(image.convert('CMYK'), quality=80, restart_marker_blocks=1)"]
    pil += [f"python: exif(image, {orientation})" for orientation in range(1, 9)]
    pil += ["python: multi_picture(image)", "python: without_tables(pillow(image, quality=80))"]
    pil += ["python: without_tables(pillow(image, quality=80, subsampling=1))"]
    return {
        "libjpeg-turbo cjpeg": cjpeg,
        "libjpeg-turbo jpegtran": jpegtran,
        "Pillow": pil,
        "simplejpeg": [
            f"python: simplejpeg.encode_jpeg(rgb.copy(), {quality}, 'RGB', {sampling!r}, {fast})"
            for quality, fast in ((85, True), (60, False))
            for sampling in ("444", "422", "420", "440", "411", "Gray")
        ],
        "OpenCV": [
            f"python: of_opencv(rgb, {options})"
            for options in (
                "cv2.IMWRITE_JPEG_QUALITY, 80", "cv2.IMWRITE_JPEG_PROGRESSIVE, 1", "cv2.IMWRITE_JPEG_OPTIMIZE, 1",
                "cv2.IMWRITE_JPEG_RST_INTERVAL, 1", "cv2.IMWRITE_JPEG_RST_INTERVAL, 5",
                "cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111", "cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x411111",
                "cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x211111", "cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x121111",
                "cv2.IMWRITE_JPEG_LUMA_QUALITY, 90, cv2.IMWRITE_JPEG_CHROMA_QUALITY, 30",
            )
        ],
        "mozjpeg": [
            *(f"python: mozjpeg.optimize(pillow(image, quality={quality}))" for quality in (50, 75, 90)),
            "python: of_jpeglib(rgb, 'mozjpeg403', qt=75)",
            "python: of_jpeglib(rgb, 'mozjpeg403', qt=40)",
        ],
        "imagecodecs": [
            "python: imagecodecs.jpeg8_encode(rgb, level=80)",
            "python: imagecodecs.jpeg8_encode(rgb, level=80, subsampling='422')",
            "python: imagecodecs.jpeg8_encode(rgb, level=80, optimize=True)",
            "python: imagecodecs.jpeg8_encode(rgb.astype(np.uint16) * 16, level=80, bitspersample=12)",
            "python: imagecodecs.jpeg8_encode(rgb[..., 0].astype(np.uint16) * 16, level=80, bitspersample=12)",
            "python: imagecodecs.ljpeg_encode(rgb[..., 0])",
            "python: imagecodecs.ljpeg_encode(rgb[..., 0].astype(np.uint16) * 16, bitspersample=12)",
            "python: imagecodecs.jpeg8_encode(rgb, level=95, lossless=True, predictor=1)",
            "python: imagecodecs.jpegls_encode(rgb)",
        ],
        "libvips": [
            f"python: of_vips(rgb, {options})"
            for options in (
                "Q=75", "Q=90, interlace=True", "Q=75, optimize_coding=True", "Q=95, subsample_mode='off'",
                "Q=80, trellis_quant=True, overshoot_deringing=True, quant_table=3", "Q=80, restart_interval=4",
            )
        ],
        "jpeglib (IJG 6b, 7, 8d, 9e)": [
            f"python: of_jpeglib(rgb, {version!r}, qt=75)" for version in ("6b", "7", "8d", "9e")
        ],
        "Qt": [
            f"python: qt(rgb, {options})"
            for options in ("75", "100", "30", "80, progressive=True", "80, optimized=True")
        ],
        "Skia": [f"python: of_skia(rgb, {quality})" for quality in (20, 60, 80, 100)],
        "Chromium's canvas": [f"python: canvas.encode(image, {quality})" for quality in (0.3, 0.7, 0.92, 1)],
        "FFmpeg": [
            f"ffmpeg -v error -i {{png}} {options} -frames:v 1 -c:v mjpeg -f image2 -y {{out}}"
            for options in (
                "-pix_fmt yuvj420p -q:v 3", "-pix_fmt yuvj422p -q:v 3", "-pix_fmt yuvj444p -q:v 3", "-q:v 20",
                "-huffman default -q:v 5", "-pix_fmt yuvj420p -threads 4 -q:v 2", "-strict unofficial -pix_fmt yuv420p",
                "-pix_fmt gray -strict -2 -q:v 4",
            )
        ],
        "GraphicsMagick": [
            f"gm convert {{png}} {options} jpg:{{out}}"
            for options in (
                "-quality 80", "-quality 95 -sampling-factor 1x1", "-quality 70 -interlace Line", "-colorspace GRAY",
                "-colorspace CMYK", "-quality 85 -sampling-factor 2x1", "-quality 85 -sampling-factor 4x1",
                "-define jpeg:optimize-coding=false -quality 60", "-define jpeg:arithmetic-coding=true",
            )
        ],
        "netpbm": [
            f"pnmtojpeg {options} {{ppm}} > {{out}}"
            for options in (
                "", "--quality=40", "--progressive", "--grayscale", "--optimize", "--restart=1", "--smooth=20",
            )
        ],
        "Guetzli": [f"guetzli --quality {quality} {{png}} {{out}}" for quality in (84, 95)],
        "Go image/jpeg": [
            f"encode-go {quality} {colour} {{ppm}} {{out}}"
            for quality, colour in ((75, "rgb"), (20, "rgb"), (95, "rgb"), (80, "grey"))
        ],
        "Java ImageIO": [
            f"java -cp . Encode {quality} {mode} {colour} {{png}} {{out}}"
            for quality, mode, colour in (
                (0.75, "baseline", "rgb"), (0.9, "progressive", "rgb"), (0.5, "optimized", "rgb"),
                (0.8, "baseline", "grey"),
            )
        ],
        "PHP gd": [f"php encode.php {options} {{png}} {{out}}" for options in ("75 0", "40 0", "80 1")],
        "jpeg-js": [f"node encode.js {quality} {{width}} {{height}} {{rgba}} {{out}}" for quality in (30, 75, 95)],
        "sharp": [
            f"node encode_sharp.js '{options}' {{png}} {{out}}"
            for options in (
                '{{"mozjpeg": true}}', '{{"quality": 90, "chromaSubsampling": "4:4:4"}}', '{{"progressive": true}}',
            )
        ],
    }  # fmt: skip


def run(command, number, folder, programs, canvas):
    """The bytes that a command writes for the picture ``number``."""
    image = drawing(number)
    if command.startswith("python: "):
        names = {**globals(), "image": image, "rgb": np.asarray(image), "canvas": canvas}
        return bytes(eval(command.removeprefix("python: "), names))  # noqa: S307  # a command of this file
    paths = {name: folder / f"a.{name}" for name in ("ppm", "png", "rgba")}
    image.save(paths["ppm"])
    image.save(paths["png"])
    paths["rgba"].write_bytes(image.convert("RGBA").tobytes())
    out = folder / "out.jpg"
    out.unlink(missing_ok=True)
    filled = command.format(**paths, out=out, width=image.width, height=image.height)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-o", "pipefail", "-c", filled], cwd=programs, env=environment, check=True)
    return out.read_bytes()


def build(programs):
    """Compile what must be compiled."""
    for name in ("encode.php", "encode.js", "encode_sharp.js"):
        shutil.copy(HERE / name, programs)
    subprocess.run(["go", "build", "-o", programs / "encode-go", HERE / "encode.go"], check=True)
    subprocess.run(["javac", "-d", programs, HERE / "Encode.java"], check=True)


def main():
    programs = Path(sys.argv[1]).absolute()
    build(programs)
    canvas = Canvas()
    rows = []
    number = 0
    with tempfile.TemporaryDirectory() as folder, tarfile.open(HERE / "corpus.tar.xz", "w:xz", preset=9) as tar:
        for encoder, lines in commands().items():
            for command in lines:
                data = run(command, number, Path(folder), programs, canvas)
                info = tarfile.TarInfo(f"{number:03d}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                rows.append({"file": info.name, "encoder": encoder, "command": command})
                number += 1
    canvas.close()
    lines = ",\n".join(json.dumps(row) for row in rows)
    (HERE / "corpus.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
