"""Frames of clips that the tests encode themselves."""

from __future__ import annotations

import av
import numpy as np
import pytest

from tests.training.tables import write_video
from training.tasks.video import VideoFolder, read_frames


def grey(frame):
    """The number of a frame of ``write_video``, from its colour."""
    return round((np.asarray(frame).mean() - 10) / 12)


@pytest.mark.parametrize(
    ("total", "wanted"),
    [
        (20, [0, 2, 5, 8, 10, 13, 16, 19]),
        (8, list(range(8))),
        (3, [0, 0, 0, 0, 1, 1, 1, 2]),
        (1, [0] * 8),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_frames_are_spread_from_first_to_last(tmp_path, total, wanted, suffix):
    path = write_video(tmp_path / f"clip.{suffix}", total, rate=5)
    frames, metadata = read_frames(path, 8)
    assert [grey(frame) for frame in frames] == wanted
    assert metadata == {"total_num_frames": total, "fps": pytest.approx(5), "frames_indices": wanted}
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (32, 32))}


def encode(path, codec, options, skip=0):
    """Twenty frames as ``write_video`` colours them; the first ``skip`` packets are lost."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        packets = []
        for number in range(20):
            image = np.full((32, 32, 3), 10 + 12 * number, dtype=np.uint8)
            packets += stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24"))
        for packet in (packets + stream.encode())[skip:]:
            container.mux(packet)
    with av.open(str(path)) as container:
        return [packet.pts for packet in container.demux(video=0) if packet.size]


def test_frames_that_are_stored_in_another_order(tmp_path):
    """With B-frames packets come in decoding order; frames are counted as shown."""
    times = encode(tmp_path / "clip.mp4", "mpeg4", {"bf": "2", "qmin": "1", "qmax": "1"})
    assert times != sorted(times)
    assert [grey(frame) for frame in read_frames(tmp_path / "clip.mp4", 20)[0]] == list(range(20))


def test_packets_that_give_no_frame(tmp_path):
    """Without its first key frame the start of the clip cannot be decoded: 19 packets, 16 frames."""
    assert len(encode(tmp_path / "clip.mkv", "libx264", {"g": "5"}, skip=1)) == 19
    frames, metadata = read_frames(tmp_path / "clip.mkv", 4)
    assert metadata["total_num_frames"] == 16
    assert metadata["frames_indices"] == [0, 5, 10, 15]
    assert [grey(frame) for frame in frames] == [4, 9, 14, 19]


def test_unreadable(tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video" * 100)
    sound = tmp_path / "sound.mkv"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for path in (broken, sound):
        with pytest.raises(ValueError, match=f"{path.name} is not a readable video"):
            read_frames(path, 8)


def test_cut_off(tmp_path):
    """Most of what the header announces is missing, although nothing fails to decode."""
    path = write_video(tmp_path / "clip.avi", 40)
    with av.open(str(path)) as container:
        starts = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: starts[9] - 8])  # between two frames, before the header of the second
    with pytest.raises(ValueError, match=r"clip.avi is not a readable video \(only \d+ of its 40 frames are there"):
        read_frames(path, 8)


def test_videos_by_name(tmp_path):
    write_video(tmp_path / "a" / "x.mp4", 1)
    write_video(tmp_path / "b" / "v_y.mkv", 1)
    (tmp_path / "b" / "notes.txt").write_text("")
    folder = VideoFolder(tmp_path)
    assert len(folder) == 2
    assert folder.find(("x", "v_x")) == tmp_path / "a" / "x.mp4"
    assert folder.find(("y", "v_y")) == tmp_path / "b" / "v_y.mkv"
    assert folder.find(("a/x.mp4",)) == tmp_path / "a" / "x.mp4"
    with pytest.raises(ValueError, match="no video 'z' or 'v_z' among the 2 of"):
        folder.find(("z", "v_z"))
