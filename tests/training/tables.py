"""Small local data sets with exactly the columns of the real ones, in the layout of a download from the Hub."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

ANSWERS = ["yellow", "yellow", "Yellow.", "the yellow", "gold", "gold", "blue", "red", "red", "unsuitable"]


def picture(number: int = 0, size: tuple[int, int] = (8, 6)) -> Image.Image:
    """An image whose colour tells its number."""
    return Image.new("RGB", size, (10 * number, 100, 200))


def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, format="PNG")
    return buffer.getvalue()


def columns_of(name: str) -> dict[str, list[Any]]:
    """Three or four rows of the benchmark ``name``: column -> values."""
    three, images = range(3), [picture(i) for i in range(3)]
    return {
        "pope": {
            "question_id": ["1", "2", "3"],
            "question": ["Is there a cat in the image?"] * 3,
            "answer": ["yes", "no", "yes"],
            "image": images,
            "category": ["random", "random", "popular"],
        },
        "vizwiz_vqa": {
            "question_id": ["a.jpg", "b.jpg", "c.jpg"],
            "image": images,
            "question": ["What colour is this?"] * 3,
            "answers": [ANSWERS] * 3,
        },
        "flickr30k": {
            "image": images,
            "caption": [[f"A {w} runs in the park.", f"The {w} is running outside."] for w in ("dog", "man", "horse")],
            "img_id": ["0", "1", "2"],
            "filename": ["0.jpg", "1.jpg", "2.jpg"],
        },
        "refcoco": {
            "question_id": ["7", "8", "9"],
            "image": images,
            "question": ["Please provide a short description for this region: [0, 0, 1, 1]."] * 3,
            "answer": [["man on left", "guy in blue"], ["red car"], ["dog", "small dog", "puppy"]],
            "bbox": [[2.0, 3.0, 4.0, 3.0], [0.0, 0.0, 8.0, 6.0], [4.0, 0.0, 4.0, 3.0]],
        },
        "textvqa": {
            "question_id": [34602, 34603, 34604],
            "image": images,
            "question": ["what colour is it?"] * 3,
            "answers": [ANSWERS] * 3,
            "ocr_tokens": [["STOP", "4 WAY"], [], ["EXIT"]],
        },
        "gqa": {
            "id": ["201", "202", "203", "204"],
            "imageId": ["n2", "n0", "n2", "n1"],
            "question": ["Is it overcast?", "Who is wearing the dress?", "What is it?", "Which side is the bear on?"],
            "answer": ["no", "woman", "bear", "left"],
        },
        "gqa images": {"id": ["n0", "n1", "n2"], "image": images},
        "ai2d": {
            "question": ["What is the predator?", "Which is the sun?", "Name D."],
            "options": [["owl", "mouse", "grass", "hawk"]] * 3,
            "answer": ["3", "0", "1"],
            "image": images,
        },
        "mathvista": {
            "pid": ["1", "2", "3", "4"],
            "question": ["How many cubes?", "What is the ratio?", "Which shape?", "What are the sides?"],
            "decoded_image": [picture(i) for i in range(4)],
            "choices": [None, None, ["circle", "square"], None],
            "unit": [None, "m", None, None],
            "precision": [1.0, 2.0, None, None],
            "answer": ["7", "0.33", "square", "[3, 4, 5]"],
            "question_type": ["free_form", "free_form", "multi_choice", "free_form"],
            "answer_type": ["integer", "float", "text", "list"],
        },
        "scienceqa": {
            "image": images,
            "question": ["Which is larger?", "What is the capital?", "Which is a solid?"],
            "choices": [["a", "b"], ["Boston", "Albany", "Salem"], ["water", "rock"]],
            "answer": [0, 2, 1],
            "hint": ["Look at the pair.", "", "Solids keep shape."],
            "lecture": ["Long.", "", ""],
            "solution": ["So b.", "", ""],
        },
        "mme": {
            "question_id": ["code/1.png", "code/1.png", "count/2.png", "count/2.png"],
            "image": [picture(i // 2) for i in range(4)],
            "question": ["Is the output 0? Please answer yes or no.", "Is it 1? Please answer yes or no."] * 2,
            "answer": ["Yes", "No", "No", "Yes"],
            "category": ["code_reasoning", "code_reasoning", "count", "count"],
        },
        "activitynet_qa": {
            "video_name": ["abc", "abc", "def"],
            "question_id": ["abc_0", "abc_1", "def_0"],
            "question": ["what is the person doing", "is he outside", "how many people are there"],
            "answer": ["dancing", "yes", "two"],
            "type": ["0", "3", "7"],
        },
        "custom": {
            "image": [png(i) for i in three],
            "question": ["What is it?"] * 3,
            "answer": ["cat", "dog", "cow"],
        },
    }[name]


def write_parquet(file: Path, columns: dict[str, list[Any]]) -> Path:
    """The columns as the Hub's converter writes them: images as an Image feature with the bytes inside."""
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(file)
    return file


def write_benchmark(folder: Path, name: str, split: str, **changes: list[Any]) -> Path:
    """The benchmark ``name`` below ``folder``; ``changes`` replace columns, or leave them out where None."""
    columns = {key: value for key, value in {**columns_of(name), **changes}.items() if value is not None}
    if name == "gqa":
        write_parquet(folder / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", columns)
        write_parquet(folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", columns_of("gqa images"))
    else:
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", columns)
    return folder


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_video(file: Path, num_frames: int, rate: int = 10) -> Path:
    """A clip whose frame i is grey of value 10 + 12 i (within a few steps after compression)."""
    import av

    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(num_frames):
            grey = np.full((32, 32, 3), (10 + 12 * number) % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return file


def write_videos(folder: Path) -> Path:
    write_video(folder / "videos" / "v_abc.mp4", 20)
    write_video(folder / "videos" / "def.avi", 12)
    return folder


def write_pairs(folder: Path) -> Path:
    """MSVD-QA's two files, the answers in another order than the questions."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = [
        {"video_name": "abc", "question": "what is a man doing?", "question_id": 10},
        {"video_name": "def", "question": "who sings?", "question_id": 11},
    ]
    answers = [{"answer": "woman", "question_id": 11}, {"answer": "cook", "question_id": 10}]
    (folder / "test_q.json").write_text(json.dumps(questions))
    (folder / "test_a.json").write_text(json.dumps(answers))
    return folder
